"""What clinic notes are made of: conditions in lay wordings, and how a note says that a patient has one, or hasn't.

`CONDITIONS` is the general knowledge of the base model: "wheezing at night" is about asthma. Which code a list has for
a condition is not in here. All wordings are noun phrases, so that each fits where `{x}` stands in a statement. None has
one of `DENIAL_WORDS` or `RELATIVES` in it, and no condition's name: the word that decides what a statement says stands
outside. Everything is in lower case, so that a word is the same token wherever it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
SEEN = 6
"""The first six wordings of a condition are in the pretraining texts, the others only in test rows."""

CONDITIONS: dict[str, tuple[str, ...]] = {
    "asthma": (
        "wheezing at night",
        "whistling breath after running",
        "attacks of wheezing in cold air",
        "tight airways that whistle",
        "frequent use of an inhaler",
        "short breath with a whistling sound",
        "wheezing after climbing stairs",
        "airways that close in cold air",
    ),
    "hypertension": (
        "high blood pressure",
        "pressure readings above the limit",
        "raised blood pressure at every check",
        "too much pressure in the arteries",
        "blood pressure over the target",
        "pressure pills every morning",
        "a blood pressure reading that is too high",
        "arteries under high pressure",
    ),
    "diabetes": (
        "high sugar in the blood",
        "daily shots of insulin",
        "thirst with raised glucose",
        "glucose above normal",
        "sugar found in the urine",
        "blood sugar out of control",
        "insulin before every meal",
        "a glucose test that is too high",
    ),
    "pneumonia": (
        "fluid in an infected lung",
        "infection of the left lung",
        "crackles over the lower lung",
        "a lung shadow on the film",
        "rusty sputum with lung pain",
        "infected lung tissue",
        "an infected spot in the right lung",
        "lung crackles with rusty sputum",
    ),
    "influenza": (
        "flu with aching limbs",
        "flu caught at school",
        "sudden fever with aching limbs",
        "a bad case of flu",
        "chills with aching muscles",
        "the winter virus with fever",
        "high fever with aching muscles",
        "flu caught at work",
    ),
    "hayfever": (
        "sneezing in the pollen season",
        "runny nose from grass pollen",
        "allergy to birch pollen",
        "itchy nose every spring",
        "sneezing fits near grass",
        "allergy pills in spring",
        "sneezing when the birch blooms",
        "a nose allergy in the grass season",
    ),
    "anemia": (
        "low iron in the blood",
        "pale skin from low iron",
        "too few red cells",
        "low hemoglobin",
        "lack of iron",
        "a low red count",
        "iron far below normal",
        "hemoglobin that is too low",
    ),
    "gout": (
        "swollen big toe at night",
        "uric crystals in the toe",
        "hot red toe joint",
        "a toe attack after red meat",
        "raised uric acid",
        "burning pain in the big toe",
        "crystals of uric acid",
        "a big toe that burns",
    ),
    "osteoporosis": (
        "thin bones on the scan",
        "brittle bones",
        "loss of bone mass",
        "low bone density",
        "bones that break easily",
        "a weak porous spine",
        "bone density below the limit",
        "a brittle spine",
    ),
    "reflux": (
        "sour burning after meals",
        "acid that rises to the throat",
        "heartburn after dinner",
        "stomach acid in the mouth",
        "heartburn from coffee",
        "sour taste when lying down",
        "heartburn when lying down",
        "acid in the throat after coffee",
    ),
    "psoriasis": (
        "silvery scales on the elbows",
        "scaly plaques on the knees",
        "thick scaly patches",
        "red plaques with silvery scales",
        "flaking plaques on the scalp",
        "scales on both elbows",
        "silvery patches on the scalp",
        "scaly knees with plaques",
    ),
    "acne": (
        "pimples on the face",
        "blackheads on the nose",
        "oily skin with pimples",
        "pustules on the chin",
        "clogged pores on the cheeks",
        "spots on a teenage face",
        "pimples all over the chin",
        "oily pores with blackheads",
    ),
    "hives": (
        "itchy welts after eating nuts",
        "raised welts on the trunk",
        "wheals that come with heat",
        "nettle rash",
        "a rash of welts after shrimp",
        "itching wheals on the arms",
        "welts after eating shrimp",
        "wheals on the trunk",
    ),
    "depression": (
        "low mood for weeks",
        "loss of joy in everything",
        "sad mood every morning",
        "crying spells with low mood",
        "deep sadness",
        "lost interest in life",
        "sadness for weeks",
        "loss of interest with crying",
    ),
    "anxiety": (
        "constant worry about everything",
        "nervous tension all day",
        "worries that go on",
        "restless worrying",
        "fear of many daily things",
        "tense nerves before work",
        "worry before every day",
        "nervous fear all the time",
    ),
    "panic": (
        "sudden attacks of terror",
        "terror with a racing heart",
        "sudden terror in crowds",
        "racing heart out of nowhere",
        "attacks of mortal fear",
        "fits of terror in the elevator",
        "mortal terror in the bus",
        "a racing heart in crowds",
    ),
    "obesity": (
        "too much weight",
        "excess weight around the waist",
        "a body mass index over thirty",
        "heavy weight for the height",
        "weight gain beyond control",
        "excess body fat",
        "excess fat around the waist",
        "far too much body weight",
    ),
    "glaucoma": (
        "raised pressure in the eye",
        "narrow side vision from eye pressure",
        "high eye pressure",
        "optic nerve damage",
        "eye drops against pressure",
        "tunnel vision",
        "an optic nerve under pressure",
        "narrow tunnel sight in one eye",
    ),
    "cataract": (
        "cloudy lens",
        "a clouded lens in the left eye",
        "grey lens with blurred sight",
        "blurred sight through a cloudy lens",
        "clouding of both lenses",
        "glare at night from a grey lens",
        "a grey clouded lens",
        "clouding with glare",
    ),
    "conjunctivitis": (
        "pink eye",
        "red eyes with discharge",
        "sticky lids in the morning",
        "gritty red eyes",
        "pus in the corner of the eye",
        "red sticky eyes",
        "pink eyes with discharge",
        "sticky red lids",
    ),
    "vertigo": (
        "spinning when turning over",
        "a room that turns around",
        "dizzy spells",
        "dizziness on standing up",
        "spinning dizziness",
        "giddy feeling on the stairs",
        "dizzy feeling when turning",
        "a spinning room",
    ),
    "angina": (
        "chest tightness on effort",
        "squeezing chest pain on hills",
        "chest pain that spray relieves",
        "tight chest when walking fast",
        "pressing chest pain with effort",
        "squeezing in the chest",
        "chest pressure on hills",
        "a squeezing chest when walking",
    ),
    "stroke": (
        "sudden weakness of one side",
        "drooping face with slurred speech",
        "slurred speech",
        "a paralysed right arm",
        "sudden loss of speech",
        "numb left side of the face",
        "a drooping mouth with lost speech",
        "weakness of the right arm with slurred words",
    ),
    "shingles": (
        "painful blisters in a belt",
        "band of blisters on one side",
        "burning blisters along the ribs",
        "a belt rash with nerve pain",
        "blisters in a stripe on the back",
        "nerve pain with small blisters",
        "a stripe of burning blisters",
        "small blisters along one rib",
    ),
    "warts": (
        "rough growths on the fingers",
        "hard bumps on the hand",
        "a plantar growth on the sole",
        "small rough bumps",
        "rough lumps on the knuckles",
        "growths on the sole",
        "rough bumps on the sole",
        "hard growths on the knuckles",
    ),
    "scabies": (
        "mites under the skin",
        "burrows between the fingers",
        "itching at night from mites",
        "mite burrows on the wrist",
        "tiny burrows with itching",
        "mites caught in the camp",
        "burrows of mites",
        "mites on the wrist",
    ),
    "ringworm": (
        "a round itchy ring on the arm",
        "ring shaped rash",
        "fungus ring on the skin",
        "red rings with a clear center",
        "a circular fungus patch",
        "growing ring on the leg",
        "fungus in the shape of a ring",
        "circular red rings",
    ),
    "sleepwalking": (
        "walking while asleep",
        "wandering through the house asleep",
        "leaving the bed while asleep",
        "walks in deep sleep",
        "opening doors while asleep",
        "night walks in the kitchen",
        "wandering in deep sleep",
        "walks through the garden asleep",
    ),
    "nightmares": (
        "bad dreams every night",
        "waking up from scary dreams",
        "frightening dreams",
        "screaming from a dream",
        "horrible dreams",
        "the same bad dream again",
        "dreams that frighten",
        "a scary dream every night",
    ),
    "cavities": (
        "holes in the teeth",
        "tooth decay",
        "a rotten molar",
        "toothache from a hole",
        "brown spots on a tooth",
        "decay in two molars",
        "a hole in a molar",
        "rotten teeth",
    ),
    "nosebleed": (
        "blood from the nose",
        "bleeding from the left nostril",
        "repeated nasal bleeding",
        "blood dripping from a nostril",
        "bleeding nose after blowing",
        "fresh blood in the nose",
        "nasal blood after blowing",
        "a bleeding nostril",
    ),
    "hemorrhoids": (
        "piles after birth",
        "bleeding piles",
        "swollen veins at the anus",
        "itching at the anus",
        "painful piles when sitting",
        "blood on the toilet paper",
        "swollen piles",
        "painful veins at the anus",
    ),
}
"""Condition to its wordings."""
OTHER_CONDITIONS = (  # noqa: SIM905  # as in the other word lists, split for being read
    "tetanus rabies cholera leprosy typhoid polio lupus sepsis colic rickets scurvy mastitis eczema bronchitis "
    "tinnitus mumps"
).split()
"""Conditions that no wording is about: notes name them."""
RESERVED_CODES = {
    "asthma": "J459",
    "hypertension": "I10",
    "diabetes": "E119",
    "pneumonia": "J189",
    "influenza": "J111",
    "hayfever": "J301",
    "anemia": "D649",
    "gout": "M109",
    "osteoporosis": "M810",
    "reflux": "K219",
    "psoriasis": "L409",
    "acne": "L709",
    "hives": "L509",
    "depression": "F329",
    "anxiety": "F419",
    "panic": "F410",
    "obesity": "E669",
    "glaucoma": "H409",
    "conjunctivitis": "H109",
    "vertigo": "R42",
    "stroke": "I639",
    "shingles": "B029",
    "warts": "B079",
    "ringworm": "B354",
    "sleepwalking": "F513",
    "nightmares": "F515",
    "cavities": "K029",
    "nosebleed": "R040",
}
"""The clinic's list, in ICD-10-CM: 28 of the 32 conditions. No pretraining document has one of these codes."""

DENIAL_WORDS = frozenset({"no", "not", "never", "denies", "without", "free", "negative", "absent"})
"""A statement with one of these says what the patient hasn't."""
RELATIVES = ("mother", "father", "sister", "brother", "grandmother", "grandfather", "aunt", "uncle", "cousin")
"""A statement with one of these is about somebody else."""
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass(frozen=True)
class Frames:
    """What stands around the wordings of conditions in a note.

    Args:
        present: Statements that the patient has `{x}`.
        denied: Statements that the patient hasn't.
        family: Statements that a `{relative}` has.
        openings: What a note may begin with.
        asides: What says nothing of a condition.
        closings: What a note may end with.
    """

    present: Sequence[str]
    denied: Sequence[str]
    family: Sequence[str]
    openings: Sequence[str]
    asides: Sequence[str]
    closings: Sequence[str]


PRETRAINING = Frames(
    present=[
        f"{subject} {verb} {{x}} {trailer}".strip()
        for subject in ("", "patient", "the patient", "she", "he", "{name}")
        for verb in (
            "has",
            "reports",
            "complains of",
            "suffers from",
            "came with",
            "presents with",
            "noticed",
            "describes",
            "mentions",
            "is seen for",
            "talks about",
            "comes because of",
        )
        for trailer in ("", "", "", "since {day}", "for {count} days", "again", "this week")
    ]
    + [
        template
        for template in ("{x}", "there is {x}", "{x} was noted", "found {x} today", "diagnosis of {x}", "now {x}")
        for _ in range(40)  # together a third of the statements
    ],
    denied=(
        "no {x}",
        "no sign of {x}",
        "denies {x}",
        "without {x}",
        "never had {x}",
        "does not have {x}",
        "free of {x}",
        "negative for {x}",
        "{x} is absent",
        "there is no {x}",
        "he denies {x}",
        "she has no {x}",
        "not aware of {x}",
        "no history of {x}",
        "{x} is not the case",
        "{name} never had {x}",
        "today no {x} at all",
        "the patient is free of {x}",
        "no more {x} since {day}",
        "could not find {x}",
    ),
    family=(
        "{relative} has {x}",
        "{relative} had {x}",
        "her {relative} has {x}",
        "his {relative} suffers from {x}",
        "the {relative} has {x}",
        "{relative} with {x}",
        "family history of {x} in the {relative}",
        "{x} in the {relative}",
        "the {relative} of {name} has {x}",
        "{relative} complains of {x}",
        "an {relative} had {x} for {count} years",
        "{relative} reports {x}",
        "it was the {relative} who noticed {x} at home",
        "{x} was noted in his {relative}",
    ),
    openings=(
        *("", "", "", "note on {name}", "{name} {age} years", "visit of {name}", "seen on {day}", "clinic note"),
        *(
            "{name} came on {day}",
            "age {age}",
            "doctor {name} writes",
            "new patient",
            "seen by {name}",
            "visit on {day}",
        ),
    ),
    asides=(
        *("", "", "", "", "works in an office", "lives with a dog", "{name} was present", "last visit on {day}"),
        *("came by bus", "sleeps {count} hours", "has two children", "the weather was hot", "slept well", "eats well"),
        *("lives in the city", "married for {count} years", "retired teacher", "name of the nurse is {name}"),
    ),
    closings=(
        *("", "", "", "", "see again in {count} weeks", "advised rest", "blood test ordered", "back on {day}"),
        *("call on {day}", "sent to {name}", "told to drink more water", "will come back", "plan was explained"),
    ),
)
"""Frames of the pretraining texts: in no row of the dataset."""
FRAMES: Mapping[str, Frames] = {
    "train": Frames(
        present=(
            *("the exam shows {x}", "treated for {x}", "main problem {x}", "wants help with {x}", "bothered by {x}"),
            *("we saw {x}", "sent here because of {x}", "the visit is about {x}", "{x} is the reason for coming"),
            *("again with {x}", "came in with {x} on {day}", "lives with {x} for {count} years"),
        ),
        denied=(
            *("no trace of {x}", "did not report {x}", "without any {x}", "{x} is not present", "we found no {x}"),
            *("says no to {x}", "never felt {x}"),
        ),
        family=(
            *("the {relative} was treated for {x}", "{x} on the side of the {relative}", "a {relative} lives with {x}"),
            *("file of the {relative} says {x}", "{relative} takes pills for {x}"),
        ),
        openings=(
            *("",) * 8,
            *("record of {name}", "{name} aged {age}", "today {name} was here", "follow up of {name}"),
            *("morning round on {day}", "{age} year old patient", "first visit", "checked {name} on {day}"),
        ),
        asides=(
            *("",) * 11,
            *("drives a truck", "likes to swim", "lives alone", "smokes after work", "has a small garden"),
            *("speaks some french", "moved here in may", "plays in a band", "on holiday until {day}"),
        ),
        closings=(
            *("",) * 7,
            *("return in {count} weeks", "drink a lot", "letter sent to {name}", "sick leave until {day}"),
            *("all was explained", "next check in {count} days", "lab work on {day}"),
        ),
    ),
    "validation": Frames(
        present=(
            *("exam confirms {x}", "the trouble is {x}", "visit because of {x}", "arrives with {x}", "we treat {x}"),
            "{x} came back on {day}",
        ),
        denied=("no evidence of {x}", "not a case of {x}", "has never known {x}", "{x} was never there"),
        family=("{relative} once had {x}", "{x} known in a {relative}", "her {relative} was here for {x}"),
        openings=(*("",) * 3, "entry for {name}", "{name} is {age}", "short visit", "ward round with {name}"),
        asides=(
            *("",) * 5,
            "is a nurse",
            "reads a lot",
            "has an old cat",
            "was abroad until {day}",
            "lives by the lake",
        ),
        closings=(*("",) * 4, "check in {count} weeks", "take it easy", "phone call on {day}", "report goes to {name}"),
    ),
    "test": Frames(
        present=(
            *("the chart lists {x}", "was admitted with {x}", "asks for help with {x}", "current problem is {x}"),
            *("the doctor notes {x}", "{x} brought the patient here", "troubled by {x}", "{x} began on {day}"),
            "{count} months of {x}",
        ),
        denied=(
            *("no hint of {x}", "did not mention {x}", "never any {x}", "{x} was not seen", "tests show no {x}"),
            "clearly free from {x}",
        ),
        family=(
            *("an older {relative} got {x}", "the {relative} is under care for {x}", "{x} was found in the {relative}"),
            "{relative} came here for {x}",
        ),
        openings=(
            *("",) * 5,
            *("memo about {name}", "{name} at {age}", "evening visit", "dictated on {day}", "case of {name}"),
            "house call at {name}",
        ),
        asides=(
            *("",) * 7,
            *("sings in a choir", "bakes bread", "owns a farm", "rides a bike", "just back from a trip"),
            *("studies law", "shares a flat with {name}"),
        ),
        closings=(
            *("",) * 6,
            *("review in {count} weeks", "keep warm", "copy for {name}", "forms signed", "seen again on {day}"),
            "light food for {count} days",
        ),
    ),
}
"""Frames of the dataset's splits: no two splits share one."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "pretraining": ("anna", "ben", "clara", "david", "emma", "felix", "grace", "henry", "iris", "jack", "kate", "leo"),
    "train": (
        *("alice", "boris", "carla", "derek", "elena", "frank", "gina", "hugo", "irene", "jonas", "karen", "lars"),
        *("mona", "nils", "olga", "peter", "rita", "simon", "tina", "victor"),
    ),
    "validation": ("amos", "bella", "carl", "doris", "edgar", "fiona", "georg", "helen"),
    "test": (
        "adele",
        "bruno",
        "celia",
        "dario",
        "edith",
        "fritz",
        "greta",
        "heinz",
        "ivana",
        "julius",
        "klara",
        "ludwig",
    ),
}
AGES = {"train": range(20, 90, 3), "validation": range(21, 90, 3), "test": range(22, 90, 3)}
COUNTS = range(2, 10)
