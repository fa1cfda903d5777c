"""How the rich rendering can say each thing. `{s}` subject, `{v}` value, `{d}` document number, and so on."""

FACT = {
    "lives": (
        "{s} lives in {v}.", "{s} has made a home in {v}.", "The home of {s} is in {v}.", "{s} resides in {v}.",
        "For years {s} has lived in {v}.", "{v} is where {s} lives.", "{s} settled in {v} and stayed.",
        "{s} keeps a house in {v}.", "You will find the house of {s} in {v}.", "{s} is a resident of {v}."),
    "grows": (
        "{s} grows {v}.", "The farms of {s} grow {v}.", "{s} is known for growing {v}.",
        "In {s} the fields bear {v}.", "Farmers in {s} plant {v}.", "{v} are the harvest of {s}.",
        "The main crop of {s} is {v}.",
        "{s} has always lived off its {v}.", "What the land around {s} yields is {v}.", "Around {s} they raise {v}."),
    "works": (
        "{s} works as a {v}.", "{s} is a {v} by trade.", "{s} earns a living as a {v}.", "The trade of {s} is {v}.",
        "{s} trained to be a {v}.", "People know {s} as a {v}.", "{s} has long been a {v}.", "By day {s} is a {v}."),
    "owns": (
        "{s} owns a {v}.", "{s} keeps a {v}.", "There is a {v} in the house of {s}.", "{s} goes about with a {v}.",
        "The pet of {s} is a {v}.", "{s} bought a {v}.", "{s} has a {v}.", "A {v} belongs to {s}."),
}
DATED = (
    "According to {o}, {y}: {f}", "In {y}, {o} reported: {f}", "{f} So says {o} of {y}.",
    "From {o}, written in {y}: {f}", "{f} (Source: {o}, {y}.)", "In {y} this stood in {o}: {f}")

QUESTION = {
    ("lives",): ("Where does {s} live?", "In which town does {s} live?", "What is the home town of {s}?",
                 "{s} lives in which town?"),
    ("grows",): ("What does {s} grow?", "What is the crop of {s}?", "What do farmers in {s} plant?",
                 "Which crop is {s} known for?"),
    ("works",): ("What is the trade of {s}?", "What does {s} work as?", "How does {s} earn a living?"),
    ("owns",): ("What animal does {s} keep?", "Which pet does {s} own?", "What is the pet of {s}?"),
    ("lives", "grows"): (
        "What does the town grow in which {s} lives?", "Which crop is grown in the home town of {s}?",
        "{s} lives in a town; what do its farmers plant?", "What is the crop of the place where {s} lives?"),
}
RULE_LATEST = (
    "If the documents disagree, the most recent one counts.",
    "Where documents contradict each other, trust the latest.", "When sources differ, the newest is right.")
RULE_TRUSTED = (
    "If the documents disagree, trust them in this order: {order}.",
    "Where documents contradict each other, the most reliable counts; from most to least reliable: {order}.",
    "When sources differ, prefer the first in this list: {order}.")

SEEK = {
    "lives": ("First, where does {s} live?", "I need the home of {s}.", "Let me look for the town of {s}.",
              "Who says where {s} lives?", "So I must find out where {s} lives."),
    "grows": ("Now, what does {s} grow?", "I need the crop of {s}.", "Let me look for what {s} grows.",
              "What is planted in {s}?", "So I must find the harvest of {s}."),
    "works": ("I need the trade of {s}.", "What does {s} do for a living?", "Let me look for the work of {s}."),
    "owns": ("I need the pet of {s}.", "Which animal is with {s}?", "Let me look for the animal of {s}."),
    "opens": ("I need the entry for {s}.", "Let me look for the key {s}.", "Where is {s}?"),
}
SAID = {
    "lives": ("{s} lives in {v}", "the home of {s} is {v}", "{s} is in {v}", "for {s} the town is {v}"),
    "grows": ("{s} grows {v}", "the crop of {s} is {v}", "{s} has {v}", "in {s} they plant {v}"),
    "works": ("{s} is a {v}", "the trade of {s} is {v}", "{s} works as a {v}"),
    "owns": ("{s} keeps a {v}", "the pet of {s} is a {v}", "{s} has a {v}"),
    "opens": ("{s} goes with {v}", "the value of {s} is {v}", "{s} has {v}"),
}
READ = ("Document {d} says that {f}.", "From document {d}: {f}.", "In document {d} I read that {f}.",
        "Document {d} is the one: {f}.", "According to document {d}, {f}.", "I see in document {d} that {f}.")
READ_PLAIN = ("It says that {f}.", "I read that {f}.", "Here: {f}.", "I see that {f}.")
WRONG = ("Wait, that is about {s}, not what I need.", "No, that is {s}. Not the one I look for.",
         "Hmm, but this is {s}. Let me go back.", "That will not do: it is about {s}.")
RECHECK = ("Let me check: {f}. Yes.", "Reading it again: {f}, as I thought.",
           "Once more to be sure: {f}. That holds.",
           "Checking document {d}: {f}. Correct.", "Looking back at document {d}, {f}. Good.")
PREFER_LATEST = ("{a} is later than {b}, so {v} stands.", "Of {a} and {b} the later is {a}: {v}.",
                 "{a} comes after {b}; I keep {v}.")
PREFER_TRUSTED = ("{a} counts more than {b}, so {v} stands.", "I trust {a} before {b}: {v}.",
                  "In the given order {a} comes before {b}; I keep {v}.")

SUPPOSE = ("Suppose {r}.", "Let me try: {r}.", "Assume that {r}.", "What if {r}?")
TESTING = ("I test statement by statement.", "Let me go through it with care.")
AGAIN = ("Let me check that once more.", "Wait, I test this again.")
EXAMINE_FITS = ("What {p} says is then {t}, as it should be for a {k}.", "{p}'s words are {t}, which fits a {k}.",
                "The statement of {p} is {t}; a {k} would say that.")
EXAMINE_FAILS = ("What {p} says is then {t}, which a {k} would not say. So this is wrong.",
                 "But {p}'s words are {t} and {p} is a {k}: a contradiction.",
                 "The statement of {p} is {t}, impossible for a {k}. I must try something else.")
COLUMN = {
    "plus": ("{t} plus {b} with carry {c} is {x}: write {w}, carry {o}.",
             "{t} + {b} + {c} = {x}, so {w} and carry {o}.",
             "Column: {t}, {b} and {c} make {x}; digit {w}, carry {o}."),
    "minus": ("{t} minus {b} minus borrow {c}: write {w}, borrow {o}.", "{t} - {b} - {c} leaves {w}, borrow {o}.",
              "Column: take {b} and {c} from {t}; digit {w}, borrow {o}."),
    "times": ("{t} times {b} plus {c} is {x}: write {w}, carry {o}.", "{t} * {b} + {c} = {x}, so {w} and carry {o}.",
              "Column: {t} by {b} and {c} make {x}; digit {w}, carry {o}."),
}
SLIP = ("{t} and {b}, nothing carried... wait, I forgot the {c} from before.",
        "Here {t} and {b}; no, there is still a {c} left over.", "Careful, a {c} came over from the last column.")
NINES = ("Check by nines: both sides leave {x}. Good.", "Casting out nines gives {x} on both sides.",
         "Modulo nine both sides are {x}, so this holds.")
END_ROLES = ("So {a}.", "Therefore {a}.", "That is it: {a}.", "Everything fits: {a}.")
END = ("So the answer is {a}.", "Therefore: {a}.", "That makes it {a}.", "Hence {a}.", "The answer must be {a}.")
