"""What the fictional shop sells, and the sentences that its reviews are made from."""

# (part, a good thing to say about it, a bad one)
Part = tuple[str, str, str]
Kind = tuple[str, str, str, tuple[Part, ...]]  # see KINDS

# noun, categories below the main one, use, parts (each with a good and a bad thing to say about it)
KINDS: tuple[Kind, ...] = (
    ("kettle", "Kitchen|Small Appliances|Kettles", "tea before work", (
        ("handle", "stays cool", "gets far too hot"), ("lid", "closes with a firm click", "never closes properly"),
        ("spout", "pours without a drip", "drips all over the table"), ("switch", "is easy to reach", "broke off"))),
    ("frying pan", "Kitchen|Cookware|Pans", "eggs on Sunday", (
        ("coating", "lets nothing stick", "came off in flakes"), ("base", "heats evenly", "warped on the stove"),
        ("handle", "sits well in the hand", "came loose"), ("rim", "is smooth all round", "has sharp edges"))),
    ("desk lamp", "Home|Lighting|Desk Lamps", "reading at night", (
        ("light", "is warm and bright", "flickers all the time"), ("arm", "holds every position", "sinks slowly"),
        ("foot", "stands firmly", "tips over"), ("dimmer", "works smoothly", "stopped working"))),
    ("backpack", "Luggage|Backpacks", "the daily train ride", (
        ("zipper", "runs smoothly", "jams at every corner"), ("straps", "are soft and wide", "cut into the shoulder"),
        ("lining", "feels strong", "tore at the seam"), ("pocket", "fits a bottle", "is too small for anything"))),
    ("headphones", "Electronics|Audio|Headphones", "long calls", (
        ("sound", "is clear and full", "is thin and noisy"), ("ear pads", "are soft for hours", "hurt after a while"),
        ("battery", "lasts all week", "is empty by noon"), ("cable", "does not tangle", "broke at the plug"))),
    ("garden hose", "Garden|Watering|Hoses", "the tomato beds", (
        ("nozzle", "gives a fine spray", "leaks on my shoes"), ("hose", "never kinks", "kinks with every step"),
        ("connector", "fits at once", "does not fit our tap"), ("reel", "rolls up easily", "cracked in the sun"))),
    ("puzzle", "Toys|Puzzles", "rainy afternoons", (
        ("pieces", "fit together neatly", "bend and fall apart"), ("picture", "is beautiful", "is dark and blurred"),
        ("box", "is sturdy", "arrived crushed"), ("colours", "are bright", "look washed out"))),
    ("yoga mat", "Sports|Fitness|Yoga Mats", "morning exercise", (
        ("surface", "has a good grip", "is slippery"), ("foam", "is thick and soft", "is paper thin"),
        ("strap", "keeps it rolled", "tore in a week"), ("smell", "was gone in a day", "is awful even now"))),
    ("shampoo", "Beauty|Hair Care|Shampoo", "dry hair", (
        ("scent", "is fresh and light", "is much too strong"), ("foam", "rinses out quickly", "leaves a film"),
        ("bottle", "opens with one hand", "leaked in the parcel"), ("formula", "leaves hair soft", "itches badly"))),
    ("dog bed", "Pets|Dogs|Beds", "our old terrier", (
        ("cover", "washes well", "ripped in the first wash"), ("filling", "keeps its shape", "went flat"),
        ("bottom", "does not slide", "slides on the floor"), ("stitching", "is neat and strong", "came undone"))),
    ("notebook", "Office|Paper|Notebooks", "lecture notes", (
        ("paper", "takes ink without bleeding", "lets the ink through"), ("binding", "lies flat", "lost its pages"),
        ("cover", "feels solid", "bent in my bag"), ("ruling", "is fine and even", "is printed askew"))),
    ("door mat", "Home|Entryway|Door Mats", "muddy boots", (
        ("bristles", "clean well", "fall out by the handful"), ("back", "grips the floor", "slides on tiles"),
        ("edge", "stays flat", "curls up"), ("print", "still looks new", "faded in a month"))),
)  # fmt: skip
DEPARTMENTS = sorted({path.split("|")[0] for _, path, _, _ in KINDS})
TITLES = {
    5: ("Love this {noun}", "Excellent {noun}", "Perfect for {use}", "Best {noun} we ever had"),
    4: ("Very good {noun}", "Good {noun}, one small flaw", "Nearly perfect", "Happy with it"),
    3: ("It is okay", "An average {noun}", "Does the job, no more", "Mixed feelings"),
    2: ("Disappointed", "Not a good {noun}", "Expected more", "Poor quality for the price"),
    1: ("Do not buy this {noun}", "Terrible", "Waste of money", "Sent it back"),
}
OPENINGS = (
    "I bought this {noun} for {use}.", "My {person} gave me this {noun} for {use}.",
    "We have used the {brand} {noun} for {time} now.", "This {noun} replaced our old one {time} ago.",
    "I wanted a {colour} {noun} for {use}.", "After {time} with this {noun} I can judge it.",
)  # fmt: skip
CLOSINGS = {
    5: ("I would buy it again at once.", "Highly recommended!", "My {person} wants one too.", "Five stars."),
    4: ("Still a good buy.", "I would recommend it to my {person}.", "Only that keeps it from five stars."),
    3: ("For the price it is all right.", "I may look for another one.", "Neither good nor bad."),
    2: ("I would not buy it again.", "My {person} has a better one.", "I had hoped for more from {brand}."),
    1: ("It went straight into the bin.", "I want my money back.", "Stay away from {brand}."),
}
PERSONS = ("sister", "neighbour", "father", "daughter", "roommate", "colleague", "aunt", "best friend")
TIMES = ("two weeks", "a month", "three months", "half a year", "a whole year", "ten days")
COLOURS = ("green", "blue", "grey", "red", "black", "white", "yellow")
ADJECTIVES = ("Classic", "Compact", "Deluxe", "Everyday", "Large", "Light", "Premium", "Simple", "Travel")
SYLLABLES = ("bar", "del", "fen", "gor", "hal", "kin", "lum", "mor", "nel", "pra", "quil", "ros", "tam", "vel", "zor")
