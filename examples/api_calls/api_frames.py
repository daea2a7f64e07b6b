"""Text around a request: openings, asides and closings, for pretraining and for each split."""

from __future__ import annotations

PRETRAINING_OPENINGS = (
    *("", "", ""),
    *("hi", "hello", "good morning", "hello bot", "hi there", "good evening", "hey", "dear assistant", "quick one"),
    *("one more thing", "sorry to bother you", "next", "a new task", "now this"),
)
PRETRAINING_CLOSINGS = (
    *("", "", ""),
    *("thanks", "thank you", "please", "cheers", "many thanks", "that is all", "best regards", "bye", "it is urgent"),
    *("as soon as you can", "let me know", "tell me when it is done", "see you"),
)
PRETRAINING_ASIDES = (
    *("", "", "", ""),
    *("I asked for this before", "my boss wants it", "it is the second time", "I am in a hurry", "we talked about it"),
    *("it was in the mail", "the client is waiting", "the team agreed", "no rush", "I hope that is fine"),
    *("we said so on {day}", "@{person} asked me to write", "I am in #{place} now", "my desk is no.{ref}"),
    *("I have x{count} other things to do", "I leave at h{hour}"),
)
"""Asides may contain distracting values, of value types that the request doesn't have."""

OPENINGS = {
    "train": (
        *("", "good afternoon", "hi team", "hello everybody", "hi bot", "morning", "a request", "hey team"),
        *("I need your help", "can you do this", "here is another one", "hope you are well", "back again"),
        *("a small thing", "something for you", "on my list"),
    ),
    "validation": (
        *("", "good day", "hello out there", "hi you", "a question", "are you there", "may I ask"),
        *("work for you", "the next job"),
    ),
    "test": (
        *("", "hey bot", "hello again", "dear all", "greetings", "hi all", "a favor", "listen", "could you help"),
        *("hello my friend", "excuse me", "from the office", "short request"),
    ),
}
CLOSINGS = {
    "train": (
        *(
            "",
            "thanks a lot",
            "thank you so much",
            "regards",
            "thanks in advance",
            "have a nice day",
            "that would help",
        ),
        *("that would help", "please confirm", "I owe you one", "much appreciated", "good bye", "please hurry"),
    ),
    "validation": ("", "thank you very much", "have a good day", "please do it", "kind regards", "talk soon"),
    "test": (
        *("", "thanks again", "many greetings", "you are the best", "take care", "have a good one", "please be quick"),
        *("that was it", "with best wishes", "until later"),
    ),
}
ASIDES = {
    "train": (
        *("", "", "the manager knows about it", "it is for a client", "I tried it myself", "it took me a while"),
        *("the others agree", "we do this every week", "I wrote it down", "it came up in the call", "I was away"),
        *("it has been like this since {day}", "@{person} told me", "I write from #{place}", "my phone is no.{ref}"),
        *("we are x{count} in the team", "I am back at h{hour}"),
    ),
    "validation": (
        *("", "", "it is on my desk", "my colleague is ill", "I could not do it", "everyone knows"),
        *("I heard it on {day}", "@{person} knows more", "#{place} is quiet today", "my room is no.{ref}"),
        *("x{count} people asked me", "I have lunch at h{hour}"),
    ),
    "test": (
        *("", "", "it was decided today", "my turn today", "the customer called", "I promised it", "it is important"),
        *("I learned it on {day}", "@{person} sits next to me", "the weather in #{place} is fine"),
        *("my extension is no.{ref}", "I got x{count} mails about it", "my shift ends at h{hour}"),
    ),
}
"""Frames of the dataset's messages: no two splits share one, and none is in a pretraining document."""
