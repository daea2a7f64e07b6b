"""What the tiny base model knows of customer support: which clauses are about which topic.

This is general language knowledge ("I want my money back" is about a refund), of the kind every real base model has. What a
company answers to a topic, its teams and its codes, is not in here and in no document the base model ever sees.
"""

from __future__ import annotations

TOPICS: dict[str, tuple[str, ...]] = {
    "refund": (
        "I want my money back for the {item}", "please refund the {item} I bought", "could I be reimbursed for the {item}",
        "I would like a refund for the {item}", "you still owe me the money for the {item}", "when is my money for the {item} paid back",
    ),
    "invoice": (
        "I need an invoice for the {item}", "please send me the bill for the {item}", "the receipt for the {item} is missing",
        "where can I find the invoice of the {item}", "my accountant asks for the receipt of the {item}", "could you mail the bill of the {item} once more",
    ),
    "login": (
        "I cannot log in to my account", "my password is not accepted", "I forgot my password", "the sign in page rejects me",
        "I am locked out of my account", "the login code never arrives",
    ),
    "delivery": (
        "my parcel with the {item} has not arrived", "when will the {item} be delivered", "the courier never brought the {item}",
        "where is the package with the {item}", "the delivery of the {item} is late", "I am still waiting for the parcel with the {item}",
    ),
    "damage": (
        "the {item} arrived broken", "the {item} was damaged in the box", "there is a crack in the {item}",
        "the {item} came in pieces", "the new {item} is scratched all over", "I unpacked a shattered {item}",
    ),
    "return": (
        "I want to send the {item} back", "how do I return the {item}", "I need a return label for the {item}",
        "where can I bring back the {item}", "the {item} goes back to you", "please collect the {item} that I return",
    ),
    "exchange": (
        "can I swap the {item} for another one", "I want to exchange the {item}", "please replace the {item} by a different model",
        "I would rather trade the {item} for a new one", "is an exchange of the {item} possible", "I would like to switch the {item} against another",
    ),
    "cancel": (
        "I want to cancel my order of the {item}", "please stop the order of the {item}", "I no longer want the {item} I ordered",
        "call off the order of the {item}", "can the order of the {item} be cancelled", "I changed my mind and do not need the {item}",
    ),
    "upgrade": (
        "I want a bigger plan", "please move me to the premium plan", "how do I upgrade my subscription",
        "I need more features in my plan", "put me on the higher tier", "can my subscription be upgraded",
    ),
    "downgrade": (
        "I want a smaller plan", "please move me to the basic plan", "how do I downgrade my subscription",
        "my plan is too big for me", "put me on the lower tier", "can my subscription be downgraded",
    ),
    "warranty": (
        "is the {item} still under warranty", "how long does the guarantee of the {item} last", "I want to claim the warranty of the {item}",
        "does the guarantee cover the {item}", "when does the warranty of the {item} end", "the {item} failed within the guarantee period",
    ),
    "coupon": (
        "my coupon does not work", "the voucher for the {item} is rejected", "the promo code is not valid",
        "I cannot redeem my voucher", "the shop ignores my coupon", "my promo code gives no discount on the {item}",
    ),
    "address": (
        "I have moved to a new house", "please change my address", "my street is wrong in your system",
        "the parcel should go to another address", "update where you ship my orders", "I live somewhere else now",
    ),
    "payment": (
        "my card is declined", "I cannot pay for the {item}", "the payment for the {item} fails",
        "checkout does not accept my card", "my bank transfer is not recognised", "paying for the {item} gives an error",
    ),
    "charge": (
        "I was charged twice for the {item}", "there is a strange amount on my statement", "you took too much money for the {item}",
        "I do not know this charge on my card", "my account was debited two times", "the amount you withdrew is wrong",
    ),
    "crash": (
        "the app crashes all the time", "your app closes by itself", "the program freezes when I open it",
        "the app quits with an error", "the screen freezes and the app dies", "every time I start the app it crashes",
    ),
    "speed": (
        "the website is very slow", "pages take forever to load", "your app is sluggish today",
        "everything loads too slowly", "the site needs minutes to open", "why is your website so slow",
    ),
    "install": (
        "I cannot install the app", "the setup of the {item} does not finish", "how do I install the software of the {item}",
        "the installer stops half way", "the installation fails on my laptop", "please help me to set up the {item}",
    ),
    "privacy": (
        "what data do you keep about me", "who can see my personal data", "I have a privacy question",
        "do you share my data with others", "I want to know what you store about me", "how is my personal information protected",
    ),
    "deletion": (
        "please delete my account", "I want my profile removed", "erase all my data",
        "close my account for good", "remove me from your system", "I want my account to be deleted",
    ),
    "language": (
        "can I switch the app to french", "the menu is in the wrong language", "do you offer support in spanish",
        "I want the site in german", "how do I change the language", "is there a translation of the manual page",
    ),
    "newsletter": (
        "stop sending me emails", "I want to unsubscribe from the newsletter", "you send me too many mails",
        "take me off the mailing list", "I never asked for your newsletter", "no more advertising mails please",
    ),
    "hours": (
        "when are you open", "what are your opening hours", "are you open on sunday",
        "until what time can I call you", "when does the shop close", "do you work on holidays",
    ),
    "stock": (
        "is the {item} available", "when is the {item} back in stock", "the {item} is sold out",
        "do you have the {item} on hand", "how many of the {item} are left", "will you get the {item} again",
    ),
    "size": (
        "which size of the {item} fits me", "the {item} is too small", "how wide is the {item}",
        "I need the measurements of the {item}", "the {item} is too large for my room", "what are the dimensions of the {item}",
    ),
    "color": (
        "do you have the {item} in blue", "I want the {item} in another color", "the {item} has the wrong color",
        "which colors does the {item} come in", "is there a green {item}", "the color of the {item} is not as shown",
    ),
    "gift": (
        "can you wrap the {item} as a gift", "the {item} is a present for my sister", "please add a gift card to the {item}",
        "I want gift wrapping for the {item}", "I give the {item} to a friend as a present", "do you sell gift cards",
    ),
    "loyalty": (
        "how many bonus points do I have", "my points are missing", "how do I use my loyalty points",
        "I did not get points for the {item}", "what is my member status", "do my bonus points expire",
    ),
    "referral": (
        "how do I invite a friend", "my friend signed up but I got no reward", "do you pay for recommendations",
        "I want to recommend you to a colleague", "where is my referral link", "I brought you a new customer",
    ),
    "complaint": (
        "your agent was rude to me", "I want to complain about your service", "I am very unhappy with you",
        "let me speak to a manager", "this is the worst service ever", "I want to file a complaint",
    ),
    "praise": (
        "your team was wonderful", "I just want to say thank you", "great service as always",
        "the {item} is fantastic", "please thank the helpful colleague", "I am very happy with the {item}",
    ),
    "career": (
        "do you have open positions", "I want to work for you", "where can I apply for a job",
        "are you hiring at the moment", "I sent you my application", "is there an internship at your company",
    ),
    "bulk": (
        "I need two hundred of the {item}", "is there a price for large orders of the {item}", "we want to order the {item} for our whole office",
        "do you give a quantity discount for the {item}", "our school needs many of the {item}", "I want to buy the {item} wholesale",
    ),
    "tax": (
        "is the tax included in the price of the {item}", "please remove the vat from my order", "our firm is exempt from tax",
        "which tax rate applies to the {item}", "my vat number is not accepted", "I need the tax shown separately",
    ),
    "repair": (
        "the {item} stopped working", "can you fix the {item}", "the {item} does not turn on",
        "I need a technician for the {item}", "the motor of the {item} is dead", "please mend my {item}",
    ),
    "manual": (
        "the instructions of the {item} are missing", "where is the user guide of the {item}", "how do I use the {item}",
        "I lost the manual of the {item}", "is there a handbook for the {item}", "I do not understand the instructions of the {item}",
    ),
    "battery": (
        "the battery of the {item} is empty after an hour", "the {item} does not charge", "which battery does the {item} need",
        "the battery gets hot", "I need a new battery for the {item}", "the {item} loses its power quickly",
    ),
    "network": (
        "I have no internet at home", "the wifi drops all day", "there is no signal in my street",
        "the connection keeps breaking", "my router shows a red light", "the internet is down again",
    ),
    "roaming": (
        "can I use my phone abroad", "what does roaming cost", "I travel to norway with my phone",
        "my phone has no service in another country", "is data abroad included", "I am going overseas and need mobile data",
    ),
    "number": (
        "I want to keep my phone number", "can I get a new phone number", "transfer my number to you",
        "my old number should move along", "please change my telephone number", "I want to port my number",
    ),
}
"""Topic to clauses that are about it."""

ITEMS = (
    "lamp", "kettle", "chair", "jacket", "phone", "camera", "printer", "toaster", "backpack", "watch", "blender", "keyboard",
    "sofa", "heater", "drill", "tent", "mirror", "carpet", "monitor", "vacuum", "radio", "guitar", "bicycle", "helmet",
)

PRETRAINING_OPENINGS = (
    "", "", "", "hello", "hi", "hey there", "good morning", "dear team", "dear sir", "good evening", "sorry to bother you",
    "one question", "quick question", "I hope you can help", "this is urgent", "hello again", "to whom it may concern",
    "greetings", "excuse me", "a short note", "I am writing because of this", "my problem is this", "listen",
)
PRETRAINING_CLOSINGS = (
    "", "", "", "thanks", "thank you", "please help", "best regards", "kind regards", "I need an answer soon", "what now",
    "can you look into it", "it is important to me", "many thanks in advance", "please call me", "cheers", "let me know",
    "I have been a customer for years", "what should I do", "please answer today", "yours truly",
)
PRETRAINING_ASIDES = (
    "", "", "", "", "my order number is {digits}", "I bought it last week", "it is the second time", "my name is {name}",
    "I ordered on {day}", "my wife told me to write", "I already called you", "it was expensive", "I use your service every day",
    "a friend of mine had this too", "I am on the train right now", "my customer number is {digits}", "it happened on {day}",
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria", "Noah")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
