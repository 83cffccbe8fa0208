"""What a teacher is told when it writes visual instructions, and what it is shown as examples (the recipe of LLaVA,
arXiv 2304.08485, section 3; the words are our own).

A prompt is a system text, a few examples as turns of a conversation, and the picture in question as captions and boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipelines.pictures import Box, DescribedPicture

CONVERSATION, DESCRIPTION, REASONING = KINDS = ("conversation", "description", "reasoning")
# Pictures of a kind by all pictures in the published set: 58, 23 and 77 of 81 thousand.
PUBLISHED_SHARES = {CONVERSATION: 0.72, DESCRIPTION: 0.28, REASONING: 0.95}

_SEEING = """\
You are looking at one picture. You cannot be shown the picture itself, so it is given to you in words: several people \
each wrote a sentence about it{boxes}. Answer as somebody who sees the picture. Never mention sentences, captions, \
boxes, coordinates or any description you were given; they are your eyes. Say only what you can be sure of from them."""
_BOXES = """, and things in it are listed with where they are, as `name: [left, top, right, bottom]` in shares of the \
picture's width and height"""
_FORM = """\
Question:
(the question)
===
Answer:
(the answer)
==="""

SYSTEM = {
    CONVERSATION: f"""\
{_SEEING.format(boxes="")}

Write a conversation between a person who asks about the picture and an assistant who sees it. Ask different kinds of \
questions: what things are there, how many, what somebody does, where things are, how they lie to each other. Ask only \
what has a definite answer: something that is clearly in the picture, or clearly not in it. Then ask one or two \
questions that go further, about what one may know of such things, and answer these at more length. Repeat this form \
for every question, and write nothing else:
{_FORM}""",
    DESCRIPTION: f"""\
{_SEEING.format(boxes=_BOXES)}

Describe the picture in detail, in one to three paragraphs: the scene as a whole, the things in it and how many there \
are, what they look like, what they do, and where they are to each other. Use the places of things to say left, right, \
near or far, and never their numbers. Write the description only.""",
    REASONING: f"""\
{_SEEING.format(boxes=_BOXES)}

Write one question about the picture that takes thinking, and its answer. The question must need knowledge of the \
world or several steps of thought: why something is so, what it is for, what may happen next, what one should mind, \
how one could go about it. It must not give away what is to be seen; whoever answers has to look. In the answer, first \
name what the picture shows that matters, then reason from it step by step to a clear conclusion.

Write in exactly this form, and nothing else:
{_FORM}""",
}

# Asked of a picture for which there is a description.
DESCRIBE_IN_DETAIL = (
    "Describe the picture in detail.",
    "What does this picture show? Please go into detail.",
    "Give a full description of the scene.",
    "Tell me everything that can be seen here.",
    "Explain in detail what is going on in this picture.",
    "Look at the picture closely and write down what you see.",
    "Could you describe this image at length?",
    "Walk me through the picture, from the whole to the details.",
    "What is there in the picture, and how is it arranged?",
    "Write a detailed account of what the photo shows.",
)


@dataclass(frozen=True)
class Example:
    """A picture as text, and what was written about it."""

    picture: DescribedPicture
    reply: str


_PIER = DescribedPicture(
    "pier.jpg",
    (
        "A woman in a yellow raincoat walks two dogs along a wet pier.",
        "Two dogs on leashes and their owner on a wooden pier in the rain.",
        "Someone with two dogs goes past moored fishing boats.",
        "A rainy day at the harbour, and a lady is out with her dogs.",
        "A person in yellow leads a brown dog and a white dog.",
    ),
    (
        Box("person", (0.412, 0.205, 0.561, 0.873)),
        Box("dog", (0.301, 0.642, 0.415, 0.862)),
        Box("dog", (0.553, 0.668, 0.668, 0.889)),
        Box("boat", (0.702, 0.311, 0.985, 0.604)),
        Box("boat", (0.012, 0.342, 0.214, 0.566)),
    ),
)
_KITCHEN = DescribedPicture(
    "kitchen.jpg",
    (
        "A boy stands on a chair at the stove and stirs a pot.",
        "A child is cooking in a small kitchen, with an adult close behind.",
        "A kid on a wooden chair holds a spoon over a steaming pot.",
        "A man watches his son who is stirring soup.",
        "Vegetables lie on a board beside the stove.",
    ),
    (
        Box("person", (0.355, 0.188, 0.552, 0.791)),
        Box("person", (0.584, 0.061, 0.842, 0.962)),
        Box("chair", (0.338, 0.622, 0.571, 0.988)),
        Box("oven", (0.021, 0.478, 0.352, 0.994)),
        Box("carrot", (0.071, 0.433, 0.132, 0.462)),
        Box("carrot", (0.118, 0.441, 0.187, 0.468)),
        Box("spoon", (0.262, 0.322, 0.371, 0.421)),
    ),
)
_BUS_STOP = DescribedPicture(
    "bus_stop.jpg",
    (
        "People wait at a bus stop while a man runs towards a departing bus.",
        "A red bus pulls away as a man with a briefcase hurries after it.",
        "A man in a suit is running beside a bus in the morning.",
        "Three people look at their phones under a bus shelter.",
        "A city street at dawn with a red double-decker bus.",
    ),
    (
        Box("bus", (0.402, 0.112, 0.958, 0.761)),
        Box("person", (0.271, 0.402, 0.372, 0.842)),
        Box("suitcase", (0.342, 0.622, 0.391, 0.703)),
        Box("person", (0.031, 0.444, 0.088, 0.782)),
        Box("person", (0.092, 0.438, 0.149, 0.779)),
        Box("person", (0.153, 0.451, 0.204, 0.784)),
        Box("cell phone", (0.061, 0.522, 0.074, 0.548)),
    ),
)


def _rounds(*texts: str) -> str:
    """Questions and answers in turn, in the form that is asked for."""
    marks = ("Question", "Answer")
    return "\n".join(f"{marks[place % 2]}:\n{text}\n===" for place, text in enumerate(texts))


EXAMPLES = {
    CONVERSATION: (
        Example(
            _PIER,
            _rounds(
                "What is the woman wearing?",
                "She is wearing a yellow raincoat.",
                "How many dogs are there?",
                "There are two dogs, a brown one and a white one.",
                "Are the dogs running free?",
                "No, both are on leashes that the woman holds.",
                "What lies beside the pier?",
                "Fishing boats are moored beside it.",
                "What should one mind when walking there on such a day?",
                "Wet wood is slippery, so it is wise to walk slowly and in shoes with a good grip. With two dogs on "
                "leashes a sudden pull could make one lose one's balance, and the edge of the pier with cold water "
                "below is near, so it is better to keep to the middle and the leashes short.",
            ),
        ),
        Example(
            _KITCHEN,
            _rounds(
                "What is the boy doing?",
                "He is stirring a pot on the stove with a spoon.",
                "What is he standing on?",
                "He is standing on a wooden chair.",
                "Is he alone in the kitchen?",
                "No, a man stands close behind him and watches.",
                "What lies beside the stove?",
                "Vegetables lie there on a board.",
                "Why might the man stay so close?",
                "A hot stove and a steaming pot can burn, and a child on a chair can lose its balance. From where he "
                "stands the man can hold the boy or take the spoon at once, and still lets him learn to cook by doing "
                "it himself.",
            ),
        ),
    ),
    DESCRIPTION: (
        Example(
            _PIER,
            "It is a rainy day at a harbour. In the middle of the picture a woman in a bright yellow raincoat walks "
            "along a wooden pier whose boards shine with water. She has a dog on a leash at either side of her, a "
            "brown one and a white one, both of them close to her legs.\n\n"
            "Fishing boats are moored along the pier: one on the right, rather near and large, and another on the left "
            "that seems to lie farther away. Nobody else is to be seen, which gives the scene a quiet mood in spite of "
            "the weather.",
        ),
        Example(
            _KITCHEN,
            "The picture shows a small kitchen. A boy stands on a wooden chair in the middle, so that he can reach the "
            "stove on the left, and stirs a steaming pot with a spoon. Right behind him, on the right side of the "
            "picture, stands a man, tall enough to fill most of its height, who watches what the boy does.\n\n"
            "On a board beside the stove lie vegetables, two carrots among them, which are probably meant for the "
            "soup.",
        ),
        Example(
            _BUS_STOP,
            "A city street early in the morning. A large red double-decker bus fills the right half of the picture and "
            "is just pulling away from its stop. Left of the bus a man in a suit is running after it, with a briefcase "
            "in his hand.\n\n"
            "At the left edge, under a bus shelter, three people stand side by side and look at their phones. They do "
            "not seem to take any notice of the man, and are probably waiting for another bus.",
        ),
    ),
    REASONING: (
        Example(
            _PIER,
            _rounds(
                "What might make this walk more difficult than usual?",
                "The woman is walking on a wooden pier in the rain, so the boards are wet and slippery. She has two "
                "dogs on leashes, one at either side, and must keep both in check: if they pull in different "
                "directions or towards the boats, she has no hand free to steady herself. The pier is also bordered by "
                "water. So she has to keep her balance on a slippery ground, mind two animals and stay away from the "
                "edge, all at the same time.",
            ),
        ),
        Example(
            _KITCHEN,
            _rounds(
                "What does the scene tell about how the two of them go about this task?",
                "The boy does the work himself: he stands on a chair to be tall enough and stirs the pot, while "
                "vegetables are ready on a board. The man does not take over; he stands close behind and watches. Hot "
                "steam and the height of the chair are dangerous for a child, which explains why he stays within "
                "reach. So this looks like learning by doing under supervision: the boy may try for himself, and the "
                "man makes sure that nothing happens.",
            ),
        ),
        Example(
            _BUS_STOP,
            _rounds(
                "Why could the next few minutes matter to the man?",
                "He is running after a bus that is already pulling away, wears a suit and carries a briefcase, and it "
                "is early in the morning. All of this suggests that he is on his way to work or to an appointment. If "
                "the driver does not see him and stop, he has to wait for the next bus like the people in the shelter, "
                "and may be late. So whether he catches this one probably decides whether he is on time.",
            ),
        ),
    ),
}


def messages(kind: str, picture: DescribedPicture) -> list[dict[str, str]]:
    """The conversation that asks for something of this kind about a picture.

    Captions only for a conversation, boxes as well for the other two, as published.
    """
    with_boxes = kind != CONVERSATION
    turns = [{"role": "system", "content": SYSTEM[kind]}]
    for example in EXAMPLES[kind]:
        turns.append({"role": "user", "content": example.picture.in_words(with_boxes=with_boxes)})
        turns.append({"role": "assistant", "content": example.reply})
    return [*turns, {"role": "user", "content": picture.in_words(with_boxes=with_boxes)}]
