"""Vocabulary of requests to a company's API: intents and their wordings, value types, and names.

`INTENTS` is the general knowledge of the base model: "a box for #oslo" is about shipping, and `#` precedes a place. The
names that a company gives its functions and parameters are not part of it.

A wording has a slot for each value type of its intent. A place is preceded by `#`, a person by `@`, the number of an
order or a door by `no.`, a quantity by `x` and an hour by `h`. Values follow these marks without a space, as they do
inside JSON's quotes and brackets, so they have the same tokens there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SYLLABLES = (  # noqa: SIM905  # split() keeps the list readable
    "ba be bo da de du fa fi ga go ka ke ko la le lo ma me mi na no pa pe po ra re ri sa se so ta te to va ve za zo"
).split()
"""Syllables of the tiny base, so that their tokens are the same."""
RESERVED_FUNCTIONS = (  # noqa: SIM905
    "zovade gorisa mebako tolefi pazeru karemo dufaso belona ravizo somite fekalu nodeva lapogo tazeri gomafe zasodu "
    "rekova mipela"
).split()
"""Names of the example's own functions, which no pretraining document has."""


@dataclass(frozen=True)
class ValueType:
    """A type of value, such as a place or a quantity.

    Args:
        parameters: Names that companies give to parameters of this type.
        phrase: Phrase for a value of this type in a request that only lists its values.
        mark: Character directly before a name of this type; empty for numbers and days.
    """

    parameters: tuple[str, ...]
    phrase: str
    mark: str = ""


@dataclass(frozen=True)
class Intent:
    """A request's intent.

    Args:
        value_types: Types of the values that every request of this intent has.
        seen: Six wordings that appear in pretraining documents.
        unseen: Two wordings that appear in test rows only.
    """

    value_types: tuple[str, ...]
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
VALUE_TYPES = {
    "place": ValueType(("site", "city", "place", "town", "where"), "#{place}", "#"),
    "origin": ValueType(("from", "source", "start", "origin"), "from #{origin}", "#"),
    "target": ValueType(("to", "goal", "end", "target"), "to #{target}", "#"),
    "person": ValueType(("user", "name", "person", "member", "who"), "@{person}", "@"),
    "count": ValueType(("units", "count", "amount", "total", "size"), "x{count}"),
    "ref": ValueType(("id", "ref", "code", "case", "key"), "no.{ref}"),
    "day": ValueType(("day", "date", "when", "weekday"), "on {day}"),
    "hour": ValueType(("hour", "time", "clock"), "at h{hour}"),
}
COUNTS, REFS, HOURS = range(2, 21), range(100, 1000), range(7, 21)

INTENTS = {
    "ship": Intent(
        ("count", "place", "day"),
        (
            "send x{count} boxes to #{place} on {day}",
            "please post x{count} parcels to #{place} by {day}",
            "on {day} we want to ship x{count} crates to #{place}",
            "#{place} needs x{count} boxes in the mail on {day}",
            "x{count} packages have to go out to #{place} on {day}",
            "dispatch x{count} parcels for #{place} this {day}",
        ),
        (
            "get x{count} cartons on the truck for #{place} before {day}",
            "by {day} the customer in #{place} wants x{count} cartons",
        ),
    ),
    "book": Intent(
        ("place", "day", "hour"),
        (
            "book a room in #{place} on {day} at h{hour}",
            "reserve the hall in #{place} for {day} at h{hour}",
            "we need a room in #{place} on {day} from h{hour}",
            "is there a free room in #{place} on {day} at h{hour}",
            "keep a table in #{place} for us on {day} at h{hour}",
            "on {day} at h{hour} we want a room in #{place}",
        ),
        (
            "hold a desk in #{place} for me on {day} at h{hour}",
            "a space for our team in #{place} on {day} at h{hour}",
        ),
    ),
    "pay": Intent(
        ("ref", "person"),
        (
            "pay bill no.{ref} of @{person}",
            "transfer the money for invoice no.{ref} to @{person}",
            "@{person} waits for the money of bill no.{ref}",
            "invoice no.{ref} from @{person} is due",
            "settle bill no.{ref} with @{person}",
            "please wire what we owe @{person} for invoice no.{ref}",
        ),
        (
            "we still owe @{person} the sum on bill no.{ref}",
            "clear the debt to @{person} on invoice no.{ref}",
        ),
    ),
    "refund": Intent(
        ("ref", "person"),
        (
            "give @{person} the money back for order no.{ref}",
            "refund order no.{ref} of @{person}",
            "@{person} wants a refund for purchase no.{ref}",
            "order no.{ref} was faulty so return the money to @{person}",
            "reimburse @{person} for order no.{ref}",
            "pay back purchase no.{ref} to @{person}",
        ),
        (
            "@{person} returned order no.{ref} and gets the cash back",
            "compensate @{person} for purchase no.{ref}",
        ),
    ),
    "remind": Intent(
        ("person", "day", "hour"),
        (
            "remind @{person} on {day} at h{hour}",
            "do not let @{person} forget it on {day} at h{hour}",
            "@{person} needs a reminder on {day} at h{hour}",
            "on {day} at h{hour} tell @{person} again",
            "send @{person} a reminder for {day} at h{hour}",
            "nudge @{person} on {day} at h{hour}",
        ),
        (
            "make sure that @{person} thinks of it on {day} at h{hour}",
            "@{person} forgets things so give a prompt on {day} at h{hour}",
        ),
    ),
    "invite": Intent(
        ("person", "place", "day"),
        (
            "invite @{person} to #{place} on {day}",
            "ask @{person} to come to #{place} on {day}",
            "@{person} should be our guest in #{place} on {day}",
            "send @{person} an invitation to #{place} for {day}",
            "on {day} we would like to have @{person} in #{place}",
            "we want @{person} to join us in #{place} on {day}",
        ),
        (
            "would @{person} like to visit us in #{place} on {day}",
            "put @{person} on the guest list of #{place} for {day}",
        ),
    ),
    "cancel": Intent(
        ("ref", "person"),
        (
            "cancel order no.{ref} of @{person}",
            "@{person} no longer wants order no.{ref}",
            "call off order no.{ref} for @{person}",
            "stop purchase no.{ref} of @{person}",
            "@{person} changed plans so drop order no.{ref}",
            "order no.{ref} of @{person} should be cancelled",
        ),
        (
            "scrap order no.{ref} because @{person} does not need it",
            "@{person} withdraws purchase no.{ref}",
        ),
    ),
    "move": Intent(
        ("count", "origin", "target"),
        (
            "move x{count} pallets from #{origin} to #{target}",
            "bring x{count} pallets over from #{origin} to #{target}",
            "take x{count} barrels from #{origin} to #{target}",
            "the stock from #{origin} has to go to #{target} and it is x{count} pallets",
            "transfer x{count} barrels of stock from #{origin} to #{target}",
            "shift x{count} pallets from #{origin} to #{target}",
        ),
        (
            "relocate x{count} barrels from #{origin} to #{target}",
            "we have to carry x{count} pallets from #{origin} to #{target}",
        ),
    ),
    "travel": Intent(
        ("origin", "target", "day"),
        (
            "I need a train from #{origin} to #{target} on {day}",
            "get me a ticket from #{origin} to #{target} on {day}",
            "on {day} I travel from #{origin} to #{target}",
            "find a flight from #{origin} to #{target} on {day}",
            "my trip from #{origin} to #{target} is on {day}",
            "plan a journey from #{origin} to #{target} for {day}",
        ),
        (
            "I have to fly from #{origin} to #{target} on {day}",
            "which railway goes from #{origin} to #{target} on {day}",
        ),
    ),
    "repair": Intent(
        ("ref", "place"),
        (
            "machine no.{ref} in #{place} is broken",
            "fix machine no.{ref} in #{place}",
            "printer no.{ref} in #{place} does not work",
            "please mend device no.{ref} in #{place}",
            "we need a mechanic for machine no.{ref} in #{place}",
            "device no.{ref} in #{place} stopped working",
        ),
        (
            "printer no.{ref} in #{place} makes a bad noise",
            "somebody damaged device no.{ref} in #{place}",
        ),
    ),
    "clean": Intent(
        ("place", "day", "hour"),
        (
            "clean the office in #{place} on {day} at h{hour}",
            "the floor in #{place} is dirty so come on {day} at h{hour}",
            "wash the windows in #{place} on {day} at h{hour}",
            "#{place} needs a cleaner on {day} at h{hour}",
            "sweep the hall in #{place} on {day} at h{hour}",
            "on {day} at h{hour} someone should wipe the desks in #{place}",
        ),
        (
            "there is dust in #{place} so send the crew on {day} at h{hour}",
            "mop the kitchen in #{place} on {day} at h{hour}",
        ),
    ),
    "hire": Intent(
        ("count", "place"),
        (
            "hire x{count} drivers in #{place}",
            "we look for x{count} new people in #{place}",
            "find x{count} workers for #{place}",
            "#{place} has x{count} open jobs",
            "recruit x{count} drivers for #{place}",
            "there are x{count} vacancies in #{place}",
        ),
        (
            "our team in #{place} should grow by x{count} workers",
            "post a job for x{count} cooks in #{place}",
        ),
    ),
    "print": Intent(
        ("count", "ref"),
        (
            "print x{count} copies of page no.{ref}",
            "I need page no.{ref} on paper and x{count} copies of it",
            "make x{count} copies of document no.{ref}",
            "run off x{count} copies of form no.{ref}",
            "document no.{ref} should be printed with x{count} copies",
            "put form no.{ref} on paper with x{count} copies",
        ),
        (
            "hand out x{count} copies of document no.{ref}",
            "we are out of form no.{ref} so produce x{count} copies",
        ),
    ),
    "meet": Intent(
        ("person", "day", "hour"),
        (
            "set up a meeting with @{person} on {day} at h{hour}",
            "I want to talk with @{person} on {day} at h{hour}",
            "plan a call with @{person} for {day} at h{hour}",
            "can I see @{person} on {day} at h{hour}",
            "put @{person} in my calendar on {day} at h{hour}",
            "on {day} at h{hour} I meet @{person}",
        ),
        (
            "find a slot with @{person} on {day} at h{hour}",
            "let me sit down with @{person} on {day} at h{hour}",
        ),
    ),
    "teach": Intent(
        ("person", "day"),
        (
            "put @{person} on the course on {day}",
            "@{person} has to learn this on {day}",
            "teach @{person} on {day}",
            "give @{person} a lesson on {day}",
            "train @{person} this {day}",
            "sign @{person} up for the class on {day}",
        ),
        (
            "@{person} is new and should get a workshop on {day}",
            "show @{person} how it works on {day}",
        ),
    ),
    "lock": Intent(
        ("ref", "place"),
        (
            "lock door no.{ref} in #{place}",
            "close gate no.{ref} in #{place}",
            "door no.{ref} in #{place} should be shut",
            "nobody may go through gate no.{ref} in #{place}",
            "please bolt door no.{ref} in #{place}",
            "gate no.{ref} in #{place} has to stay closed",
        ),
        (
            "secure door no.{ref} in #{place}",
            "keep people out of gate no.{ref} in #{place}",
        ),
    ),
    "open": Intent(
        ("place", "hour"),
        (
            "open the shop in #{place} at h{hour}",
            "the shop in #{place} should open at h{hour}",
            "start business in #{place} at h{hour}",
            "let the customers in at h{hour} in #{place}",
            "#{place} opens its doors at h{hour}",
            "the store in #{place} begins at h{hour}",
        ),
        (
            "raise the shutters in #{place} at h{hour}",
            "unlock the store in #{place} at h{hour}",
        ),
    ),
    "audit": Intent(
        ("place", "day"),
        (
            "check the books in #{place} on {day}",
            "the audit of #{place} is on {day}",
            "inspect the accounts of #{place} on {day}",
            "go through the records in #{place} on {day}",
            "on {day} we review the numbers of #{place}",
            "verify the accounts in #{place} on {day}",
        ),
        (
            "look over the ledgers of #{place} on {day}",
            "do an inspection of the finances in #{place} on {day}",
        ),
    ),
    "charge": Intent(
        ("count", "person"),
        (
            "charge @{person} x{count} euros",
            "bill @{person} for x{count} euros",
            "@{person} owes us x{count} euros",
            "take x{count} euros from @{person}",
            "debit x{count} euros from the account of @{person}",
            "collect x{count} euros from @{person}",
        ),
        (
            "@{person} has to give us x{count} euros",
            "claim x{count} euros from @{person}",
        ),
    ),
    "lend": Intent(
        ("ref", "person"),
        (
            "lend laptop no.{ref} to @{person}",
            "@{person} wants to borrow laptop no.{ref}",
            "give tablet no.{ref} to @{person} for a while",
            "@{person} may use camera no.{ref}",
            "hand laptop no.{ref} over to @{person}",
            "loan camera no.{ref} to @{person}",
        ),
        (
            "let @{person} take tablet no.{ref} home",
            "@{person} picks up camera no.{ref} for the week",
        ),
    ),
    "delay": Intent(
        ("ref", "day"),
        (
            "push task no.{ref} back to {day}",
            "task no.{ref} has to wait until {day}",
            "delay task no.{ref} to {day}",
            "project no.{ref} will be late so make it {day}",
            "postpone project no.{ref} until {day}",
            "put task no.{ref} off till {day}",
        ),
        (
            "we cannot finish task no.{ref} before {day}",
            "give project no.{ref} more time until {day}",
        ),
    ),
    "ride": Intent(
        ("person", "place", "hour"),
        (
            "get a taxi for @{person} in #{place} at h{hour}",
            "@{person} needs a cab in #{place} at h{hour}",
            "pick @{person} up in #{place} at h{hour}",
            "send a car for @{person} to #{place} at h{hour}",
            "a driver should fetch @{person} in #{place} at h{hour}",
            "call a taxi for @{person} to #{place} at h{hour}",
        ),
        (
            "@{person} wants to be driven from #{place} at h{hour}",
            "have a limousine ready for @{person} in #{place} at h{hour}",
        ),
    ),
    "lunch": Intent(
        ("count", "place", "day"),
        (
            "order lunch for x{count} people in #{place} on {day}",
            "we are x{count} hungry people in #{place} on {day}",
            "bring food for x{count} guests to #{place} on {day}",
            "x{count} guests want to eat in #{place} on {day}",
            "on {day} we need x{count} meals in #{place}",
            "x{count} sandwiches for #{place} on {day}",
        ),
        (
            "feed x{count} visitors in #{place} on {day}",
            "we want pizza for x{count} guests in #{place} on {day}",
        ),
    ),
    "alarm": Intent(
        ("place", "hour"),
        (
            "set the alarm in #{place} at h{hour}",
            "turn the siren on in #{place} at h{hour}",
            "the alarm in #{place} should ring at h{hour}",
            "arm the building in #{place} at h{hour}",
            "watch #{place} for thieves from h{hour}",
            "protect the building in #{place} from h{hour}",
        ),
        (
            "guard the warehouse in #{place} from h{hour}",
            "switch the sensors in #{place} on at h{hour}",
        ),
    ),
}
OTHER_KEYS = (  # noqa: SIM905
    "scan pack sort fetch paint weigh label store water heat build record vote rent mark"
).split()
"""Keys without wordings; requests for them name the key."""


def made_up(rng: random.Random) -> str:
    """Draw a made-up word of two or three syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3, 3))))


ENGLISH = ("make", "take")
"""English words of the wordings that syllables can spell; never used as names."""


def _reserved_names() -> dict[str, dict[str, tuple[str, ...]]]:
    """Draw the dataset's names, by split and by mark; no two lists share one."""
    rng, taken = random.Random("names of the api example"), set(RESERVED_FUNCTIONS)
    names: dict[str, dict[str, tuple[str, ...]]] = {}
    for split, count in {"train": 120, "validation": 24, "test": 48}.items():
        names[split] = {}
        for mark in ("#", "@"):
            chosen: list[str] = []
            while len(chosen) < count:
                name = made_up(rng)
                if name not in taken:
                    taken.add(name)
                    chosen.append(name)
            names[split][mark] = tuple(name for name in chosen if name not in ENGLISH)
    return names


RESERVED_NAMES = _reserved_names()
"""Places and people of the dataset, which no pretraining document has."""
PLACES = (  # noqa: SIM905
    "oslo paris rome berlin madrid london vienna dublin lisbon prague athens geneva milan tokyo boston dallas denver"
).split()
PEOPLE = (  # noqa: SIM905
    "anna ben clara david emma felix grace henry iris jack kate leo maria noah olga paul rosa"
).split()
