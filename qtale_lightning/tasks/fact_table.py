"""What `facts` knows: everyday facts by relation, and the ways to ask for each relation.

Wording is regular and the vocabulary small, and validation phrasings are made of the training phrasings'
words, so that a model of a few layers can learn the facts and carry them over to sentences it has never seen.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Relation:
    """What is known of many subjects, and the ways to ask for it.

    Attributes:
        train: Phrasings of training questions; `{s}` stands for the subject.
        validation: Phrasings of validation questions.
        table: `answer: subject, subject; answer: subject; …`.
        also: Further answers of the table that are true of a subject, and so can't be offered as wrong ones.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    table: str
    also: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def facts(self) -> list[tuple[str, str]]:
        """(subject, answer) pairs in the table's order."""
        entries = (entry.partition(":") for entry in " ".join(self.table.split()).split(";"))
        return [
            (subject.strip(), answer.strip())
            for answer, _, subjects in entries
            for subject in subjects.split(",")
        ]

    def wrong_answers(self, subject: str, answer: str) -> tuple[str, ...]:
        """Answers of this relation that aren't true of a subject, in the table's order."""
        true = (answer, *self.also.get(subject, ()))
        return tuple(dict.fromkeys(other for _, other in self.facts() if other not in true))


RELATIONS: dict[str, Relation] = {
    "use": Relation(
        train=(
            "What is {s} used for?",
            "What do people use {s} for?",
            "People use {s} for what?",
            "What is the use of {s}?",
            "Here is {s}. What is it used for?",
            "Here is {s}. What do people use it for?",
            "For what is {s} used?",
            "For what do people use {s}?",
        ),
        validation=("Here is {s}. For what is it used?", "Here is {s}. For what do people use it?"),
        table="""
            driving nails: a hammer; cutting wood: a saw; cutting paper: a pair of scissors; cutting bread: a
            knife; writing letters: a pen; sweeping the floor: a broom; staying dry in the rain: an umbrella;
            opening a lock: a key; baking bread: an oven; keeping food cold: a fridge; telling the time: a
            clock; measuring temperature: a thermometer; measuring length: a ruler; measuring weight: a scale;
            looking at stars: a telescope; looking at tiny things: a microscope; cleaning teeth: a toothbrush;
            washing hands: soap; drying the body: a towel; sewing clothes: a needle; digging holes: a shovel;
            reaching high places: a ladder; eating soup: a spoon; boiling water: a kettle; taking photos: a
            camera; giving light: a lamp; resting the head: a pillow; rubbing out pencil marks: an eraser;
            combing hair: a comb; smoothing clothes: an iron; carrying water: a bucket; catching fish: a
            fishing rod; sleeping outdoors: a tent; crossing a river: a boat; keeping money: a wallet; holding
            books: a bookshelf; frying eggs: a frying pan; finding north: a compass; chopping trees: an axe;
            sending a letter: a stamp
        """,
        also={
            "a pair of scissors": ("cutting bread",),
            "a knife": ("cutting paper", "cutting wood"),
            "a saw": ("chopping trees", "cutting bread"),
            "an axe": ("cutting wood",),
            "a towel": ("staying dry in the rain",),
            "a boat": ("catching fish",),
            "a tent": ("staying dry in the rain",),
            "a frying pan": ("baking bread",),
            "a kettle": ("carrying water",),
            "a pen": ("sending a letter",),
        },
    ),
    "kind": Relation(
        train=(
            "What kind of thing is {s}?",
            "{s} is what kind of thing?",
            "What is {s} a kind of?",
            "{s} is a kind of what?",
            "Think of {s}. What kind of thing is it?",
            "Think of {s}. What is it a kind of?",
            "Of what kind is {s}?",
            "Think of {s}. It is what kind of thing?",
        ),
        validation=("Think of {s}. It is a kind of what?", "Think of {s}. Of what kind is it?"),
        table="""
            fruit: an apple, a banana, a pear, a lemon, a cherry, a strawberry, a plum;
            vegetable: a carrot, an onion, a potato, a cabbage;
            mammal: a dog, a cat, a cow, a horse, a sheep, a lion, an elephant;
            bird: an owl, a duck, an eagle, a crow, a penguin;
            fish: a salmon, a shark, a tuna;
            insect: a bee, an ant, a butterfly, a beetle;
            tree: an oak, a pine, a maple;
            flower: a rose, a tulip, a daisy;
            tool: a hammer, a saw, a screwdriver;
            furniture: a chair, a table, a sofa;
            vehicle: a car, a bus, a truck;
            clothing: a shirt, a coat, a sock;
            musical instrument: a piano, a violin, a flute;
            metal: iron, gold, silver;
            drink: milk, tea, coffee
        """,
        also=dict.fromkeys(("an apple", "a pear", "a lemon", "a cherry", "a plum"), ("tree",)),
    ),
    "place": Relation(
        train=(
            "Where do you find {s}?",
            "Where can you find {s}?",
            "In what place do you find {s}?",
            "In what place can you find {s}?",
            "You look for {s}. Where do you look?",
            "You want to find {s}. Where do you look?",
            "Where do you look for {s}?",
            "You can find {s} in what place?",
        ),
        validation=(
            "You look for {s}. In what place do you look?",
            "You want to find {s}. In what place can you look?",
        ),
        table="""
            kitchen: a stove, a fridge, a kettle; bathroom: a bathtub, a shower, a toothbrush;
            bedroom: a pillow, a mattress, a blanket; school: a blackboard, a classroom;
            farm: a tractor, a cow, a scarecrow; sea: a whale, a shark, an octopus; sky: a cloud, a rainbow;
            desert: a camel, a cactus; hospital: a surgeon, a patient; airport: a runway, a pilot;
            court: a judge, a jury; church: an altar, a priest
        """,
        also={
            "a pillow": ("hospital",),
            "a mattress": ("hospital",),
            "a blanket": ("hospital",),
            "a shower": ("hospital",),
            "a pilot": ("sky",),
            "a priest": ("hospital",),
            "a camel": ("farm",),
        },
    ),
    "material": Relation(
        train=(
            "What is {s} made of?",
            "What is {s} mostly made of?",
            "Of what is {s} made?",
            "{s} is made of what?",
            "{s} is mostly made of what?",
            "Look at {s}. What is it made of?",
            "Look at {s}. What is it mostly made of?",
            "Look at {s}. It is made of what?",
        ),
        validation=("Look at {s}. Of what is it mostly made?", "Of what is {s} mostly made?"),
        table="""
            glass: a window, a mirror; paper: a newspaper, an envelope, a book; metal: a nail, a coin, an
            anchor, a sword; rubber: a tire, an eraser, a balloon; wax: a candle, a crayon; wood: a log, a
            plank, a pencil; wool: a sweater; snow: a snowman, an igloo; cotton: a towel; leather: a saddle;
            clay: a brick
        """,
        also={"a sweater": ("cotton",), "a book": ("leather",)},
    ),
    "colour": Relation(
        train=(
            "What colour is {s}?",
            "{s} has what colour?",
            "What colour has {s}?",
            "What is the colour of {s}?",
            "Look at {s}. What colour is it?",
            "Look at {s}. What colour has it?",
            "Look at {s}. What is its colour?",
            "The colour of {s} is what?",
        ),
        validation=("Look at {s}. It has what colour?", "Look at {s}. Its colour is what?"),
        table="""
            green: grass, a frog, a cucumber, a leaf; blue: the clear sky, a blueberry;
            white: snow, milk, a polar bear, a swan, rice; black: coal, a crow, tar;
            red: blood, a strawberry, a ripe tomato, a cherry; yellow: a banana, a lemon, the sun;
            orange: a carrot, a pumpkin; brown: chocolate, soil; pink: a flamingo, a pig; gray: an elephant
        """,
        also={
            "grass": ("brown", "yellow"),
            "a frog": ("brown",),
            "a leaf": ("yellow", "red", "orange", "brown"),
            "a blueberry": ("black",),
            "a swan": ("black",),
            "rice": ("brown", "black"),
            "a ripe tomato": ("yellow", "orange"),
            "a cherry": ("black", "yellow"),
            "a banana": ("green",),
            "a lemon": ("green",),
            "the sun": ("orange", "white", "red"),
            "a carrot": ("yellow",),
            "a pumpkin": ("green", "white", "yellow"),
            "chocolate": ("white", "black"),
            "soil": ("black", "red", "gray"),
            "a flamingo": ("white", "red", "orange"),
            "a pig": ("black", "brown", "white"),
            "an elephant": ("brown",),
        },
    ),
    "taste": Relation(
        train=(
            "How does {s} taste?",
            "What does {s} taste like?",
            "{s} tastes how?",
            "What is the taste of {s}?",
            "You try {s}. How does it taste?",
            "You try {s}. What does it taste like?",
            "You try {s}. What is the taste of it?",
            "The taste of {s} is what?",
        ),
        validation=("You try {s}. The taste of it is what?", "You try {s}. It tastes how?"),
        table="""
            sweet: honey, sugar, candy, cake; sour: a lemon, vinegar; salty: sea water, a pretzel;
            bitter: black coffee, strong medicine; spicy: chili
        """,
        also={
            "a lemon": ("bitter",),
            "sea water": ("bitter",),
            "candy": ("sour",),
            "strong medicine": ("sour",),
        },
    ),
    "sound": Relation(
        train=(
            "What sound does {s} make?",
            "What is the sound of {s}?",
            "{s} makes what sound?",
            "The sound of {s} is what?",
            "You hear {s}. What sound does it make?",
            "You hear {s}. What is its sound?",
            "You hear {s}. It makes what sound?",
            "What sound do you hear from {s}?",
        ),
        validation=("You hear {s}. Its sound is what?", "You hear what sound from {s}?"),
        table="""
            bark: a dog; meow: a cat; moo: a cow; baa: a sheep; quack: a duck; roar: a lion; neigh: a horse;
            oink: a pig; buzz: a bee; hiss: a snake; hoot: an owl; howl: a wolf; croak: a frog; squeak: a
            mouse; tick: a clock; ring: a bell
        """,
        also={
            "a dog": ("howl",),
            "a cat": ("hiss", "howl"),
            "a pig": ("squeak",),
            "a wolf": ("bark",),
            "an owl": ("hiss",),
            "a clock": ("ring",),
        },
    ),
    "young": Relation(
        train=(
            "What is the young of {s} called?",
            "The young of {s} is called what?",
            "What do you call the young of {s}?",
            "What is the name for the young of {s}?",
            "Look at {s}. What is its young called?",
            "Look at {s}. Its young is called what?",
            "What is a baby of {s} called?",
            "A baby of {s} is called what?",
        ),
        validation=("Look at {s}. What do you call its young?", "What do you call a baby of {s}?"),
        table="""
            puppy: a dog; kitten: a cat; calf: a cow, an elephant, a whale; foal: a horse; lamb: a sheep;
            piglet: a pig; chick: a hen; duckling: a duck; tadpole: a frog; kid: a goat; cub: a bear, a lion;
            fawn: a deer; joey: a kangaroo; caterpillar: a butterfly
        """,
        also={"a duck": ("chick",), "a deer": ("calf",)},
    ),
    "opposite": Relation(
        train=(
            "What is the opposite of {s}?",
            "The opposite of {s} is what?",
            "{s} is the opposite of what?",
            "What word is the opposite of {s}?",
            "Take the word {s}. What is its opposite?",
            "Take the word {s}. Its opposite is what?",
            "What is the opposite of the word {s}?",
            "The opposite of the word {s} is what?",
        ),
        validation=("Take the word {s}. What word is its opposite?", "The word {s} is the opposite of what?"),
        table="""
            cold: hot; small: big; slow: fast; down: up; night: day; closed: open; dry: wet; soft: hard; dark:
            bright; sad: happy; young: old; late: early; empty: full; poor: rich; weak: strong; short: tall,
            long; dirty: clean; quiet: loud; false: true; thin: thick; narrow: wide; shallow: deep; smooth:
            rough; far: near; right: left; cheap: expensive; last: first; war: peace; sell: buy; pull: push
        """,
        also={
            "big": ("short",),
            "tall": ("small",),
            "loud": ("soft",),
            "rough": ("soft",),
            "strong": ("soft",),
            "thick": ("narrow",),
            "wide": ("thin",),
        },
    ),
}
