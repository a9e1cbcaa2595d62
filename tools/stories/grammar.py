"""The words of the stories: plain data, no logic.

Every sentence is a pattern.  ``[a|b|c]`` picks one alternative (they nest); ``{slot}`` is filled by
``corpus.Teller``: ``{hero}`` (the name or "the fox"), ``{he}``/``{him}``/``{his}``, ``{char}``, ``{moral}``,
``{setting}``, ``{name}``, ``{elder}`` and ``{pal}`` (long on first mention, short afterwards), ``{place}``,
``{treat}``, ``{thing}``, ``{folk}``, ``{when}``.
"""

from typing import NamedTuple

CHARACTERS = (
    "rabbit", "fox", "bear", "mouse", "squirrel", "hedgehog", "turtle", "frog", "duckling", "kitten",
    "puppy", "lion", "deer", "beaver", "sparrow", "badger", "lamb", "pony", "penguin", "raccoon",
)  # fmt: skip
MORALS = (
    "honesty", "kindness", "courage", "patience", "sharing", "friendship", "gratitude", "perseverance",
    "humility", "forgiveness", "teamwork", "responsibility", "generosity", "respect", "trust",
)  # fmt: skip
SETTINGS = ("forest", "village", "garden", "meadow", "castle")

PLACES = {
    "forest": (
        "the hollow oak", "the mossy bridge", "the blackberry thicket", "the fern clearing", "the fallen pine",
        "the quiet brook", "the ring of mushrooms", "the windy ridge",
    ),
    "village": (
        "the market square", "the old well", "the baker's door", "the clock tower", "the stone bridge",
        "the schoolhouse", "the mill by the stream", "the blacksmith's shed",
    ),
    "garden": (
        "the rose arch", "the pumpkin patch", "the lily pond", "the potting shed", "the cherry tree",
        "the sunflower row", "the herb bed", "the ivy wall",
    ),
    "meadow": (
        "the buttercup hill", "the lone willow", "the clover patch", "the shallow stream", "the wooden gate",
        "the tall grass", "the flat rock", "the bluebell hollow",
    ),
    "castle": (
        "the great hall", "the tallest tower", "the royal kitchen", "the drawbridge", "the dusty library",
        "the moonlit courtyard", "the winding staircase", "the armor room",
    ),
}  # fmt: skip

HABITS = {
    "forest": ("count acorns", "follow the winding paths", "listen to the wind in the pines", "climb mossy logs"),
    "village": ("watch the carts roll by", "smell the fresh bread", "greet every neighbor", "play by the well"),
    "garden": ("chase butterflies", "smell the roses", "dig in the soft soil", "hide among the cabbages"),
    "meadow": ("roll in the clover", "watch the clouds", "pick daisies", "race the grasshoppers"),
    "castle": ("slide down the banisters", "explore the long halls", "wave at the guards", "peek into every tower"),
}

GIRLS = (
    "Tilly", "Rosie", "Luna", "Maple", "Poppy", "Hazel", "Daisy", "Willa", "Nora", "Clover", "Ivy", "Mina",
    "Bella", "Juniper", "Olive", "Ruby", "Fern", "Pearl",
)  # fmt: skip
BOYS = (
    "Milo", "Benny", "Oscar", "Rufus", "Toby", "Jasper", "Finn", "Barney", "Otto", "Felix", "Hugo", "Sam",
    "Theo", "Bramble", "Rusty", "Leo", "Pip", "Max",
)  # fmt: skip
PALS = (
    "Dot the shrew", "Wren the otter", "Gus the ram", "Sunny the hen", "Bo the hare", "Lark the magpie",
    "Nell the quail", "Moss the newt", "Ash the mule", "Bean the chipmunk", "Lottie the calf", "Kit the crow",
)  # fmt: skip
ELDERS = (
    "an old owl", "a wise tortoise", "a gentle heron", "a gray goose", "an elderly mole", "a patient donkey",
    "a silver swan", "a kindly stork", "a white-haired goat", "an ancient toad", "a soft-spoken cow",
    "a cheerful grandmother",
)  # fmt: skip
TREATS = (
    "ripe berries", "honey cakes", "sweet pears", "warm bread", "golden apples", "roasted chestnuts", "juicy plums",
    "ginger cookies", "fresh carrots", "sugared nuts",
)  # fmt: skip
THINGS = (
    "a silver bell", "a red kite", "a blue lantern", "a painted drum", "a shiny button", "a wooden flute",
    "a glass marble", "a woolen scarf", "a tiny music box", "a brass key",
)  # fmt: skip
WHENS = (
    "one morning", "one bright morning", "one rainy afternoon", "one day", "one windy day", "early one spring day",
    "one chilly autumn day", "one summer evening", "just before the harvest", "on the first day of winter",
    "late one afternoon", "one foggy dawn", "on market day", "the day before the big feast",
)  # fmt: skip

OPENINGS = (
    "[once upon a time|long ago|many years ago], in a [quiet|sunny|small|green|faraway|peaceful] {setting}, there "
    "lived a [little|young|small|lively|cheerful|shy] {char} named {name}.",
    "there once was a [playful|clever|busy|dreamy|bold|gentle] {char} named {name} who lived in a [big|beautiful|"
    "hidden|merry|cozy] {setting}.",
    "in the [heart|middle] of a [lovely|quiet|bright|sleepy] {setting} lived {name}, a [young|small|curly-tailed|"
    "bright-eyed] {char} who loved to {habit}.",
    "{name} was a [curious|proud|quick|quiet|merry|restless] {char} who lived in a {setting} [near {place}|with "
    "{his} family|full of friends|far from the busy roads].",
    "a [little|young|small] {char} called {name} lived in a [pretty|wide|noisy|cozy|tidy] {setting}, and every day "
    "{he} liked to {habit}.",
    "everyone in the {setting} knew {name}, [the little {char} who loved to {habit}|a {char} with a bright smile and "
    "quick feet|a young {char} with big dreams].",
    "near {place}, in a [calm|small|windy|golden] {setting}, a {char} named {name} [had a cozy home|lived with {his} "
    "family|spent {his} days].",
    "the [youngest|smallest|friendliest|loudest] {char} in the {setting} was named {name}, and {he} loved to {habit}.",
    "this is the story of {name}, a [brave little|small and clever|young|good-hearted] {char} from a [distant|"
    "charming|leafy|tiny] {setting}.",
    "have you heard about {name}? {He} was a [cheerful|tiny|stubborn|hopeful] {char} who lived in a [green|quiet|"
    "famous|snowy] {setting}.",
    "in a {setting} where [the sun always seemed to shine|the birds sang every morning|everyone knew everyone|the "
    "nights were full of stars], there lived a {char} named {name}.",
    "when the [sun rose|bells rang|mist lifted|birds woke up] over the {setting}, a {char} named {name} was [always|"
    "usually|often] the first to [wake|run outside|laugh].",
)
MORAL_FIRST = (
    "[some lessons take time|everyone has something to learn], and {name} the {char} learned about {moral} in a "
    "[quiet|sunny|busy|small] {setting}.",
    "in a [quiet|green|little|bright] {setting}, a {char} named {name} did not yet know what {moral} [meant|was "
    "worth].",
    "{name}, a [young|little|lively] {char} from a [small|merry|leafy] {setting}, [thought {moral} was only a word|had "
    "heard about {moral} but did not understand it].",
)
DETAILS = (
    "{his} favorite spot was {place}.",
    "{he} could often be found near {place}.",
    "{he} had many friends, but {his} best friend was {pal}.",
    "{he} was [quick to laugh|good at games|full of ideas|never still for long], but {he} still had a lot to learn.",
    "most of all, {he} [loved|enjoyed] {treat}.",
    "{he} [carried|treasured] {thing} wherever {he} went.",
)
FEELINGS = (
    "{hero} felt [a heavy stone in {his} chest|very small|sad and tired|unsure what to do|{his} cheeks grow hot].",
    "that night {hero} [could not sleep|lay awake and watched the moon|thought about it for a long time].",
    "[soon|before long], {hero} [felt lonely|felt sorry|knew that something was wrong|began to worry].",
)
REACTIONS = (
    "{folk} [cheered|smiled|clapped|gasped with joy].",
    "{hero} [smiled from ear to ear|felt warm inside|had never felt so happy|danced all the way home].",
    '"{thanks}" said {pal}.',
    '"[I am proud of you|That was well done|You have a good heart]," said {elder}.',
)
THANKS = ("Thank you, my friend!", "What a wonderful day!", "I will never forget this!", "You made me so happy!")
CLOSINGS = (
    "[from that day on|ever since that day|after that], {hero} [always remembered|never forgot|told everyone about] "
    "the value of {moral}.",
    "and so {hero} learned that {moral} [{worth}].",
    "and that is how a [little|small|young] {char} in a {setting} learned the value of {moral}.",
    "{hero} [had learned|understood at last|now knew] that {moral} [{worth}].",
    'when friends asked what had changed, {hero} [smiled|laughed] and said, "I learned the value of {moral}."',
    "{folk} still tell the story of the {char} who learned [about {moral}|the value of {moral}|what {moral} means].",
    "the {setting} was a happier place, because [one|a] {char} had learned the value of {moral}.",
    '"[Now I understand|Now I see|I will remember]," said {hero}, "{moral} [{worth}]."',
    "the moral of the story is that {moral} [{worth}].",
    "and whenever {hero} walked past {place}, {he} remembered that {moral} [{worth}].",
)

# What a closing may say of a moral: "honesty [...]".
WORTH = {
    "honesty": "makes the heart light|is braver than any lie|builds friendships that last|is always the best path",
    "kindness": "always finds its way back|costs nothing and gives so much|can change a whole day|makes friends of "
    "strangers",
    "courage": "means doing the right thing while afraid|lives even in the smallest heart|grows with every step|is "
    "stronger than fear",
    "patience": "brings the sweetest rewards|turns small things into great ones|is worth every quiet minute|helps "
    "good things grow",
    "sharing": "makes every joy bigger|turns a little into plenty|fills more hearts than keeping|is the best part of "
    "having",
    "friendship": "is the greatest treasure of all|makes every road shorter|is worth more than gold|shines in hard "
    "times",
    "gratitude": "makes what we have enough|turns small gifts into treasures|begins with two simple words|warms the "
    "giver and the friend",
    "perseverance": "turns falling into flying|opens doors that strength cannot|wins in the end|means trying one "
    "more time",
    "humility": "is the mark of a true champion|opens our ears to others|makes us easy to love|teaches more than "
    "winning",
    "forgiveness": "sets two hearts free|mends what anger breaks|is a gift we give each other|lets us begin again",
    "teamwork": "makes heavy loads light|can move even mountains|turns many small paws into one great force|makes "
    "hard work fun",
    "responsibility": "means keeping the promises we make|makes others feel safe|starts with small tasks|is how we "
    "grow up",
    "generosity": "makes the giver rich in joy|is measured by the heart|comes back in a hundred ways|lights up cold "
    "days",
    "respect": "opens every door|begins with listening|is owed to great and small|makes room for everyone",
    "trust": "is built one step at a time|holds friends together|is a bridge between hearts|is precious and must be "
    "kept",
}


class Scene(NamedTuple):
    """One plot of one moral: a problem, a wrong turn, the advice that turns it, the good ending."""

    problem: tuple[str, ...]
    wrong: tuple[str, ...]
    turn: tuple[str, ...]
    good: tuple[str, ...]


SCENES: dict[str, tuple[Scene, ...]] = {
    "honesty": (
        Scene(
            (
                "{when}, {hero} [broke|cracked|knocked over] {elder_s} favorite [vase|teapot|jar|bowl] while playing "
                "[tag|ball|hide and seek] near {place}.",
                "{when}, while [running|dancing|jumping] past {place}, {hero} [smashed|broke] a [jar|pot|window] that "
                "belonged to {elder}.",
            ),
            (
                '"It was the wind," {he} [said|whispered|told everyone], and hid the pieces [under a bush|in a corner|'
                "behind a wall].",
                "{he} [blamed|pointed at] {pal}, who [had done nothing|was nowhere near|began to cry].",
            ),
            (
                'but the lie [felt heavy|would not let {him} rest], so {he} went back and said, "[I did it|It was me], '
                'and I am sorry."',
                '{elder} [said softly|looked at {him} and said], "A broken pot can be mended, but a lie breaks more '
                'than clay," and {hero} told the [truth|whole truth].',
            ),
            (
                "{elder} [was not angry at all|forgave {him} at once], and together they [glued|picked up|mended] the "
                "pieces.",
                "to {his} surprise, {elder} [hugged|thanked] {him} for telling the truth, and {pal} [smiled again|"
                "shook {his} hand].",
            ),
        ),
        Scene(
            (
                "{when}, {hero} found {thing} lying near {place}.",
                "{when}, something [glittered|sparkled|shone] by {place}, and {hero} picked up {thing} that somebody "
                "had lost.",
            ),
            (
                "{he} [wanted|longed] to keep it, so when {pal} asked about it, {he} [shook {his} head|said nothing|"
                "said {he} had seen nothing].",
                '"Finders keepers," {he} [thought|said], and [hid it under {his} pillow|tucked it away at home].',
            ),
            (
                "then {he} saw {pal} [crying|searching everywhere|looking under every leaf], for it had been a gift "
                "from [a grandmother|an old friend|a brother].",
                '{elder} asked, "[How would you feel if it were yours|Whose smile would it bring back]?" and {hero} '
                "[blushed|looked down].",
            ),
            (
                '{he} ran to {pal} and said, "I found it, and I should have told you," and {pal} [hugged {him}|jumped '
                "for joy|shared {treat} with {him}].",
                "{hero} gave it back and told the truth, and {pal} [trusted {him} more than ever|laughed with relief].",
            ),
        ),
        Scene(
            (
                "{when}, there was a [race|jumping contest|baking contest|singing contest] near {place}, and {hero} "
                "wanted to win [more than anything|at any price].",
                "{when}, {folk} held a great [race|contest] around {place}, and the prize was a basket of {treat}.",
            ),
            (
                "{he} [took a secret shortcut|cheated when nobody looked|copied {pal}], and [won|took first place].",
                "nobody saw {him} [cheat|sneak through the bushes], and soon {he} was holding the prize.",
            ),
            (
                "but the [cheering|applause] made {him} feel [worse|ashamed], because {pal} had [tried so hard|won "
                "fairly].",
                'when {elder} said, "You must be proud," {hero} [felt a lump in {his} throat|could not answer].',
            ),
            (
                "{he} stood up, told everyone the truth, and gave the prize to {pal}, and {folk} [cheered even louder|"
                "clapped for {his} brave words].",
                '"I did not win fairly," {he} [said aloud|told them all], and {elder} said that was the finest victory '
                "of the day.",
            ),
        ),
    ),
    "kindness": (
        Scene(
            (
                "{when}, {pal} [came to|arrived at] {place}, [cold and hungry|wet and shivering|tired and alone].",
                "{when}, {hero} met {pal}, who had hurt a [leg|foot|toe] near {place}.",
            ),
            (
                "{hero} [was in a hurry|wanted to play|did not want to be late] and walked right past.",
                '"Somebody else will help," thought {hero}, and [hurried on|looked away].',
            ),
            (
                "but {he} remembered how [{elder}|a stranger] had once [helped|carried|comforted] {him}, and {he} "
                "turned around.",
                'then {elder} [said|called], "A kind word weighs nothing, yet it can lift a heart," and {hero} ran '
                "back.",
            ),
            (
                "{he} brought [a blanket|warm soup|{treat}] and stayed until {pal} [felt better|could smile|fell "
                "asleep].",
                "{he} [bandaged the wound|shared {his} coat] and helped {pal} all the way home, and they became dear "
                "friends.",
            ),
        ),
        Scene(
            (
                "{when}, the others [laughed at|teased] {pal} for [singing off key|being so slow|wearing odd socks|"
                "being new].",
                "{when}, a new neighbor, {pal}, sat alone by {place} and nobody [said hello|came near].",
            ),
            (
                "{hero} [laughed too|joined in|giggled with them], because {he} wanted to [fit in|be liked].",
                "{hero} [looked away|kept playing], afraid that {his} friends would laugh at {him}.",
            ),
            (
                "then {he} saw a tear roll down, and {his} heart [sank|ached].",
                '"How would you feel over there?" asked {elder}, and {hero} [thought hard|knew the answer].',
            ),
            (
                '{he} walked over and said, "[Come and play with us|You can sit with me|I like your song]," and soon '
                "everyone was [laughing together|playing together].",
                "{he} offered {treat} and a smile, and {pal} turned out to be the [funniest|best] friend of all.",
            ),
        ),
        Scene(
            (
                "{when}, {elder} was [carrying a heavy basket|struggling with firewood|sweeping leaves] near {place}.",
                "{when}, {elder} had no one to [fetch water|mend the fence|carry the apples].",
            ),
            (
                "{hero} [only thought of {his} games|pretended not to see].",
                "{hero} [grumbled|sighed] that it was not {his} job.",
            ),
            (
                "but then {he} noticed how [tired|slow|shaky] {elder} had become, and {he} felt [ashamed|sorry].",
                'but {pal} said, "[A small help is a big gift|Two hands are better than one wish]," and {hero} put '
                "down {his} toys.",
            ),
            (
                "{he} worked until sunset, and the [smile|hug|song] {he} got was better than any prize.",
                "the next week, when {hero} [fell ill|was sad], {elder} came with {treat} and sat beside {him}.",
            ),
        ),
    ),
    "courage": (
        Scene(
            (
                "{when}, a [storm|flood|strong wind] came, and {pal} was trapped near {place}.",
                "{when}, {hero} heard {pal} [crying for help|calling out] from beyond {place}.",
            ),
            (
                "{hero} was [afraid of thunder|scared of the dark|afraid of deep water], and {his} legs [shook|would "
                "not move].",
                '"I am too small," {he} [whispered|thought], and hid [behind a stone|under a table].',
            ),
            (
                'then {he} remembered the words of {elder}: "Being brave is being scared and going anyway."',
                "but nobody else was near, so {he} took a deep breath and [stepped forward|counted to three].",
            ),
            (
                "step by step, {he} [crossed the dark|fought the wind], [held out a rope|took a paw] and brought {pal} "
                "home safe.",
                "{he} [ran through the rain|lit a lantern and went], and {pal} was [rescued|saved] before nightfall.",
            ),
        ),
        Scene(
            (
                "{when}, {hero} was asked to [sing|speak|dance] in front of {folk}.",
                "{when}, it was {his} turn to [climb to|leap over|swim across to] {place}, and everyone was watching.",
            ),
            (
                "{his} knees [shook|trembled], and {he} [ran away|hid] to {place}.",
                "{he} said {he} had a [stomach ache|sore foot] and [crept|slipped] away.",
            ),
            (
                '{elder} found {him} and said, "[I was afraid too, the first time|Even the tallest tree was once a '
                'seed]."',
                '"Just take one small step," said {pal}, "and I will [stand beside you|hold your paw]."',
            ),
            (
                "so {he} tried, and although {his} voice [shook|was small] at first, it grew [strong|clear], and "
                "{folk} cheered.",
                "{he} closed {his} eyes, took one step and then another, and [did it|made it].",
            ),
        ),
        Scene(
            (
                "{when}, a [big bully|loud wolf|grumpy boar] began to [take food from|scare] the little ones near "
                "{place}.",
                "{when}, a [strange noise|dark shadow|low growl] came from {place}, and everyone [hid|ran away].",
            ),
            (
                "{hero} wanted to [hide too|run home], and {his} heart beat like a drum.",
                "at first {hero} [said nothing|looked at the ground] like all the others.",
            ),
            (
                "but {pal} was [shaking|crying], and {hero} knew that somebody had to stand up.",
                '"Fear is only big when nobody looks at it," {elder} had told {him}.',
            ),
            (
                '{he} stepped forward and said in a clear voice, "[Please stop|Who is there]?" and it was only a '
                "[lonely|frightened|hungry] stranger who needed a friend.",
                "{he} [walked up|stood tall] and spoke [firmly|calmly], and the trouble [melted away|ended] like snow.",
            ),
        ),
    ),
    "patience": (
        Scene(
            (
                "{when}, {elder} gave {hero} a [tiny seed|small bulb] to plant near {place}.",
                "{when}, {hero} planted [a seed|an apple pip|a bean] by {place} and wanted it to grow [at once|by "
                "noon].",
            ),
            (
                "every [hour|morning] {he} dug it up to [look|check], and nothing grew.",
                "{he} [shouted at it|pulled at the first green leaf|poured far too much water on it], and it began to "
                "droop.",
            ),
            (
                '"[Let it sleep|Leave it be]," said {elder}. "[Roots grow where you cannot see|Good things need '
                'time]."',
                "then {he} saw how {pal} [watered a flower and waited|sat calmly by a nest], and {he} decided to wait "
                "too.",
            ),
            (
                "days became weeks, and at last a [golden flower|tall sunflower|strong little tree] opened in the sun.",
                "{he} [watered it|sang to it] each day and waited, until {treat} and blossoms were enough for everyone.",
            ),
        ),
        Scene(
            (
                "{when}, {elder} was baking {treat}, and {hero} could not wait to taste them.",
                "{when}, {hero} wanted to learn the [flute|drum|violin] and play a song that very day.",
            ),
            (
                "{he} [rushed|hurried] everything, and it [went wrong|ended in a mess].",
                "{he} [stamped {his} feet|grumbled] and tried to do it all at once, and [everything spilled|nothing "
                "worked].",
            ),
            (
                '"Slowly, slowly," [said|laughed] {elder}, "[the river reaches the sea one drop at a time|the moon '
                'does not hurry]."',
                "{pal} showed {him} how to [breathe|count to ten] and do one small thing at a time.",
            ),
            (
                "{he} waited and tried again, little by little, and the result was [sweeter|better] than {he} had "
                "dreamed.",
                "after many quiet days {he} [did it perfectly|got it right], and {folk} came to [taste|listen|see].",
            ),
        ),
        Scene(
            (
                "{when}, {hero} and {pal} went [fishing|to watch for fireflies|to wait for the shooting stars] near "
                "{place}.",
                "{when}, {hero} wanted to [make friends with|see] a shy [bird|butterfly|little stranger] that "
                "lived by {place}.",
            ),
            (
                "{he} [jumped about|made noise|splashed], and everything [hid|flew away].",
                'after a minute {he} [groaned|cried], "This takes too long!" and [ran around|kicked a stone].',
            ),
            (
                '{elder} smiled and said, "[Be still, and the world will come to you|Wait, and watch]."',
                "then {he} [sat down|grew quiet] and listened to {his} own breath.",
            ),
            (
                "the sun sank, and just then a hundred little lights [rose|danced] around {him}.",
                "{he} waited without a sound, and at last it came [so close that {he} could touch it|and sat beside "
                "{him}].",
            ),
        ),
    ),
    "sharing": (
        Scene(
            (
                "{when}, {hero} found a whole basket of {treat} near {place}.",
                "{when}, {elder} gave {hero} a big bag of {treat}.",
            ),
            (
                '"[Mine, all mine|These are only for me]," {he} [said|sang], and [hid them|ate alone] while {pal} '
                "went hungry.",
                "{he} hid them [in a hole|behind a door|under {his} bed], so that nobody could ask for one.",
            ),
            (
                "but {he} ate so many that {his} belly [ached|hurt], and the rest began to [spoil|dry out].",
                'then {pal} gave {him} half of [a last crust|a tiny cookie] and said, "[It tastes better together|One '
                'for you, one for me]."',
            ),
            (
                "{he} carried the basket to {place} and called everyone, and it became the merriest [feast|picnic] of "
                "the year.",
                "{he} [blushed|laughed] and shared all that was left, and even [the smallest bite|one piece] tasted "
                "wonderful.",
            ),
        ),
        Scene(
            (
                "{when}, {hero} got {thing} for {his} birthday.",
                "{when}, {elder} made {thing} for {hero}, and {pal} asked to try it.",
            ),
            (
                '"No, it is mine," {he} [said|snapped], and [ran off|turned away] to play alone.',
                "{he} [held it tight|locked it in a box] and would not let anyone come near.",
            ),
            (
                "but playing alone was [dull|lonely], and {he} could hear the others laughing by {place}.",
                '"[Why is it so quiet here|What good is joy in a box]?" asked {elder}.',
            ),
            (
                "{he} let everyone take a turn, and together they [made up a new game|laughed until evening].",
                "{hero} passed it from paw to paw, and {he} had never had so much fun.",
            ),
        ),
        Scene(
            (
                "{when}, the [well|stream] near {place} ran low, and only {hero} had [water|a full barrel].",
                "{when}, snow covered everything, and {hero} had the only [warm home|full pantry].",
            ),
            (
                "{he} [closed the door|shook {his} head] when {pal} came to ask.",
                '"What if there is not enough for me?" {he} [worried|asked], and said no.',
            ),
            (
                "through the window {he} saw {pal} [shivering|sitting alone], and {his} supper lost its taste.",
                '{elder} said, "A candle loses nothing by lighting another."',
            ),
            (
                "{he} opened the door wide, each guest brought a little something, and there was [enough|plenty] for "
                "all.",
                "{he} gave everyone a part, and that evening was full of [songs|stories] and warmth.",
            ),
        ),
    ),
    "friendship": (
        Scene(
            (
                "{when}, {hero} and {pal} [argued|quarreled] about [a game|{thing}|who was faster].",
                "{when}, {hero} met [some popular animals|a group with fancy hats] and left {pal} waiting by {place}.",
            ),
            (
                '"I do not need you," {he} [said|shouted], and [walked away|went home alone].',
                "{he} forgot {his} promise and [laughed with the others|did not look back].",
            ),
            (
                "but when {he} [fell into a ditch|got lost|twisted a foot], the only one who came was {pal}.",
                '"[Gold can be found again, but a true friend is rare|A day without a friend is long]," said {elder}.',
            ),
            (
                "{he} said sorry, and they [shared {treat}|hugged] and [played until the stars came out|laughed about "
                "it all].",
                "the two [held paws|sat side by side] and promised to [stay friends|stand by each other] forever.",
            ),
        ),
        Scene(
            (
                "{when}, {hero} was [new|lonely] and wished for a friend to play with near {place}.",
                "{when}, {hero} saw {pal} sitting alone by {place}.",
            ),
            (
                "{he} was too [shy|proud] to say hello, and [played alone|stayed at home] for days.",
                "{he} thought {pal} was too [different|strange|quiet], and kept away.",
            ),
            (
                'then {elder} said, "[To have a friend, be a friend|The first hello is the hardest]."',
                "then a ball rolled to {his} feet, and {pal} [smiled|waved] at {him}.",
            ),
            (
                "they found out that they both loved to {habit}, and from then on they did it together.",
                "soon they were [building a hut|telling jokes|sharing secrets], and no day was lonely again.",
            ),
        ),
        Scene(
            (
                "{when}, {pal} was ill and could not come to the [fair|feast|big game].",
                "{when}, {hero} was invited to a [grand party|picnic], but {pal} was not.",
            ),
            (
                "{hero} wanted to go anyway, and [put on {his} best hat|ran ahead].",
                "{hero} went alone, but the [music|cakes] did not seem so sweet.",
            ),
            (
                "halfway there {he} stopped, because a [place|seat] beside {him} was empty.",
                '"[Who would you like to laugh with|What is a feast without a friend]?" asked {elder}.',
            ),
            (
                "{he} turned back with {treat}, and the two had [their own little party|the best evening ever].",
                "{he} sat by the bed and told stories, and {pal} felt better [by morning|at once].",
            ),
        ),
    ),
    "gratitude": (
        Scene(
            (
                "{when}, {hero} got {thing} from {elder}, but {he} had wanted something bigger.",
                "{when}, {hero} looked at {his} small [home|supper|bed] and wished for more.",
            ),
            (
                "{he} [frowned|complained] and did not even say thank you.",
                '"[Why do others have more|This is not enough]?" {he} [grumbled|cried].',
            ),
            (
                "then {he} met {pal}, who had [no home|almost nothing] and yet was thankful for [a sunny day|a warm "
                "stone|a drop of rain].",
                '"Count your gifts before you count your wishes," said {elder}, and {hero} began to count.',
            ),
            (
                "{he} counted [the sun, a warm bed and good friends|friends, songs and {treat}], and ran home to say "
                "thank you.",
                "{he} [hugged|thanked] everyone {he} loved, and {his} little home seemed like a palace.",
            ),
        ),
        Scene(
            (
                "{when}, {pal} worked all day to [mend {his} roof|find {his} lost scarf|cook {his} supper].",
                "{when}, {folk} [gathered food|built a little house] for {hero} after a storm.",
            ),
            (
                "{hero} took it all [without a word|as if it were nothing] and went to play.",
                "{he} only said that it [could have been better|took too long].",
            ),
            (
                "later {he} saw how [sad|tired] {pal} looked, and {he} understood.",
                '"Two small words can be a great gift," {elder} reminded {him}.',
            ),
            (
                '{he} brought {treat} and said, "Thank you for all you do," and {pal} [beamed|glowed with joy].',
                "{he} [wrote a song|made a card|picked flowers] to say thank you, and everyone felt warm inside.",
            ),
        ),
        Scene(
            (
                "{when}, a cold wind blew away all the {treat} that {hero} had.",
                "{when}, {hero} lost {thing} and thought {he} had nothing left.",
            ),
            (
                "{he} sat by {place} and [cried|sulked], and would not look up.",
                '"[Nothing good ever happens to me|I have nothing]!" {he} [said|wailed].',
            ),
            (
                '{elder} sat down beside {him} and asked, "What do you still have?"',
                "then {pal} came and [sat with {him}|sang a little song], and the sky turned pink and gold.",
            ),
            (
                "{hero} looked around and was thankful for [the sunset|a friend|{his} strong legs], and {his} tears "
                "dried.",
                "every evening after that, {he} named three good things and said thank you for each.",
            ),
        ),
    ),
    "perseverance": (
        Scene(
            (
                "{when}, {hero} tried to [climb|reach] the top of {place}, but {he} slipped.",
                "{when}, {hero} wanted to learn to [swim|skate|whistle|juggle], but it was hard.",
            ),
            (
                'after three tries {he} [sat down|cried] and said, "[I give up|I cannot do it]."',
                "the others [laughed|giggled], and {he} threw down {his} [cap|scarf] and walked away.",
            ),
            (
                "then {he} saw [an ant|a snail|a spider] that fell ten times and [got up|started again] eleven times.",
                '"You have not failed," said {elder}, "you have only not finished."',
            ),
            (
                "{he} tried again and again, every day a bit [better|higher], until one morning {he} [did it|made it].",
                "{his} paws were sore, but {he} kept going, and at last {folk} saw {him} succeed.",
            ),
        ),
        Scene(
            (
                "{when}, {hero} began to build a [bridge|boat|tree house|tower] near {place}.",
                "{when}, a storm [broke|washed away] the little [bridge|dam|house] that {hero} had built.",
            ),
            (
                "it fell down [twice|again], and {he} wanted to [quit|stop] for good.",
                "{he} kicked the [sticks|stones] and said it was [impossible|useless].",
            ),
            (
                'but {pal} handed {him} one more stick and said, "[Once more|Try it another way]."',
                "{elder} told {him} how {place} was [built|made] stone by stone over many years.",
            ),
            (
                "{he} changed the plan, worked on, and [on the seventh try|at last] it stood firm in the wind.",
                "piece by piece it grew, and in the end {folk} [walked across|came to admire] it.",
            ),
        ),
        Scene(
            (
                "{when}, there was a long race to {place}, and {hero} was the slowest of all.",
                "{when}, {hero} set out on a long walk to {place} to bring medicine to {elder}.",
            ),
            (
                "halfway there {he} was tired and [sat down to quit|wanted to turn back].",
                "the road was [steep|muddy], and the others passed {him} one by one.",
            ),
            (
                '"One more step," {he} told {himself}, "and then one more."',
                "but {he} [remembered|thought of] {pal}, who believed in {him}, and {he} stood up.",
            ),
            (
                "when the moon rose, {he} arrived at last, and nobody had ever been [prouder|happier].",
                "{he} did not stop, and {he} reached the end while faster ones were still [resting|asleep].",
            ),
        ),
    ),
    "humility": (
        Scene(
            (
                "{when}, {hero} won a [race|contest|game] near {place} and could talk of nothing else.",
                '"I am the best {char} in the whole {setting}," {hero} [boasted|bragged] {when}.',
            ),
            (
                "{he} [laughed at|made fun of] {pal} for being slow, and {folk} grew tired of {him}.",
                "{he} would not listen to [advice|anyone], for {he} thought {he} knew it all.",
            ),
            (
                "then {he} [fell into the mud|got stuck], and it was {pal} who pulled {him} out.",
                '"The tallest flower still needs the soil," said {elder}.',
            ),
            (
                '{hero} bowed {his} head and said, "I have much to learn from you," and {pal} smiled.',
                "{he} stopped bragging and began to [ask|listen], and everyone liked {him} better.",
            ),
        ),
        Scene(
            (
                "{when}, {hero} told everyone that {he} could find the way to {place} with {his} eyes closed.",
                "{when}, {hero} said that {he} needed no help to [bake|build|sing] better than anyone.",
            ),
            (
                "{he} did not ask anybody, and soon {he} was [lost|in trouble].",
                "{he} [waved|brushed] away {pal}, and everything went wrong.",
            ),
            (
                "{he} had to ask [a tiny ant|a small snail|{elder}] for help, and that was hard for {him}.",
                '"Nobody knows everything," said {elder} kindly, "and asking is wise."',
            ),
            (
                "{he} thanked {his} little helper, and never again thought that {he} was above the others.",
                "{he} learned from {pal}, and the work turned out [twice as good|better than ever].",
            ),
        ),
        Scene(
            (
                "{when}, {folk} praised {hero} for a [fine song|beautiful painting|great supper] that {pal} had helped "
                "to make.",
                "{when}, {hero} was chosen to lead the [parade|team], and {he} put on a [tall hat|golden crown].",
            ),
            (
                "{he} [took|kept] all the praise for {himself} and walked about with {his} nose in the air.",
                "{he} gave orders all day and never [helped|lifted a paw].",
            ),
            (
                "but soon {he} stood alone, and {he} missed {his} friends.",
                '{elder} whispered, "A good leader walks behind as often as in front."',
            ),
            (
                '"I did not do it alone," {he} told them, and called {pal} to stand beside {him}.',
                "{he} took off the hat, picked up a broom and worked with the rest, and they cheered.",
            ),
        ),
    ),
    "forgiveness": (
        Scene(
            (
                "{when}, {pal} [broke|lost] {thing} that {hero} loved.",
                "{when}, {pal} forgot the promise to meet {hero} at {place}.",
            ),
            (
                "{hero} was so angry that {he} would not [speak|play] for days.",
                '"I will never forgive you," {he} [shouted|said], and slammed the door.',
            ),
            (
                "but anger [made the days gray|was a heavy bag to carry], and {he} missed {his} friend.",
                '"[Have you never made a mistake|Who carries the anger, you or your friend]?" asked {elder}.',
            ),
            (
                '{he} went to {pal} and said, "I forgive you," and both of them [cried and laughed|felt light again].',
                "the two [hugged|shook paws], and the old game was more fun than ever before.",
            ),
        ),
        Scene(
            (
                "{when}, {pal} said something [unkind|hurtful] to {hero} in front of everyone.",
                "{when}, {pal} ate all the {treat} that {hero} had saved.",
            ),
            (
                "{hero} planned a [trick|revenge] and told the others to stay away.",
                "{hero} turned {his} back each time {pal} tried to say sorry.",
            ),
            (
                "then {he} found a [note|flower] by {his} door that said, [I am so sorry|Please forgive me].",
                '{elder} said, "A thorn hurts until you let it go."',
            ),
            (
                "{hero} took a deep breath, let the anger go, and invited {pal} to [supper|play].",
                "{he} smiled and said that it was all right, and they shared [a plate of {treat}|a long walk].",
            ),
        ),
        Scene(
            (
                "{when}, a clumsy stranger stepped on the [flowers|sand castle|tower of stones] {hero} had made.",
                "{when}, {hero} made a bad mistake and [spilled|dropped] all the {treat} for the feast.",
            ),
            (
                "{hero} [cried|stamped {his} feet] and could think of nothing else all day.",
                "{hero} [hid in a corner|sat by {place}] with a dark face and a sore heart.",
            ),
            (
                '"[Mistakes are how we all learn|Everyone stumbles sometimes]," said {elder}.',
                '{pal} sat down and said, "Nobody did it on purpose. [Let us start again|We can fix it together]."',
            ),
            (
                "so {hero} forgave, and together they made [a new one|new {treat}] that was even better.",
                "{he} wiped {his} eyes, let it go, and made a new friend that very day.",
            ),
        ),
    ),
    "teamwork": (
        Scene(
            (
                "{when}, a big [log|rock|cart] blocked the way to {place}.",
                "{when}, a [storm|strong wind] broke the [bridge|roof|fence] near {place}.",
            ),
            (
                '"I can do it alone," said {hero}, and {he} pushed until {he} was [red|tired], but nothing moved.',
                "everyone [shouted|argued] and pulled in a different direction, and nothing moved.",
            ),
            (
                'then {elder} said, "One stick breaks, but a bundle does not."',
                '"What if we all [push|pull] at the same time?" asked {pal}.',
            ),
            (
                "they counted to three, [pushed|worked] as one, and the job was done before sunset.",
                "{hero} called {pal} and the others, each did a small part, and [soon|by evening] it was done.",
            ),
        ),
        Scene(
            (
                "{when}, {folk} wanted to [put on a play|hold a great feast|win the boat race].",
                "{when}, all the {treat} had to be [picked|carried home] before the rain.",
            ),
            (
                "{hero} wanted to do everything {his} own way, and [dropped|mixed up] half of it.",
                "{hero} and {pal} [raced|fought] to be first, and ended up in a heap.",
            ),
            (
                "watching [a line of ants|a flock of geese], {he} saw how each one helped the next.",
                '"You are quick and {pal} is strong," said {elder}. "Together you are both."',
            ),
            (
                "they made a [chain|plan], everyone did what they did best, and it was a great success.",
                "side by side they [finished|won], and they shared the prize at {place}.",
            ),
        ),
        Scene(
            (
                "{when}, {thing} fell into a deep hole near {place}, and {hero} could not reach it.",
                "{when}, {pal} was stuck [in the mud|high in a tree], and {hero} was too small to help alone.",
            ),
            (
                "{he} jumped and stretched [all morning|again and again], but it was too far.",
                "{he} did not want to ask for help, and the sun was already sinking.",
            ),
            (
                "at last {he} called {his} friends, and each one had [an idea|a rope, a stick or an idea].",
                '"Why do you try alone?" asked {elder}. "[Many paws make light work|We are all here]."',
            ),
            (
                "one stood on the shoulders of another, and together they [did it|reached the bottom].",
                "they [tied|put] everything together, pulled as one, and [cheered|laughed] when it worked.",
            ),
        ),
    ),
    "responsibility": (
        Scene(
            (
                "{when}, {elder} asked {hero} to [water the plants|feed the chicks|watch the little ones] near "
                "{place}.",
                "{when}, it was {his} task to [close the gate|light the lamps|ring the bell].",
            ),
            (
                "but {hero} [went to play|fell asleep|forgot] and left it undone.",
                '"I will do it later," {he} [said|yawned], and ran off with {pal}.',
            ),
            (
                "in the evening {he} saw [the drooping leaves|what had happened], and {his} heart sank.",
                '"[Others count on you|A promise is like a bridge]," said {elder}. "[What will you do now|Somebody '
                'must hold it up]?"',
            ),
            (
                "{he} did not make excuses, but worked all night to put it right, and never forgot again.",
                "{he} said sorry and did {his} task every day, and soon {folk} gave {him} the [key|most important "
                "job].",
            ),
        ),
        Scene(
            (
                "{when}, {hero} got a little [pet snail|plant|chick] to take care of.",
                "{when}, {pal} lent {hero} {thing} and asked {him} to take good care of it.",
            ),
            (
                "at first it was fun, but soon {he} [forgot|grew bored] and left it out in the rain.",
                "{he} put it down near {place} and [forgot about it|ran off to play].",
            ),
            (
                "when {he} came back, it was in trouble, and {he} knew whose fault it was.",
                '"To care for something is to think of it every day," {elder} said.',
            ),
            (
                "{he} cleaned it, kept it safe and warm, and looked after it from then on.",
                "{he} told the truth, made it good again, and [checked on it|took care of it] each morning.",
            ),
        ),
        Scene(
            (
                "{when}, {hero} [left toys all over|made a big mess at] {place}.",
                "{when}, {hero} was playing with [fire|paint|the water gate], and it got out of hand.",
            ),
            (
                "{he} ran away and hoped that somebody else would clean up.",
                '"It is not my problem," {he} said, until {pal} [tripped|got hurt].',
            ),
            (
                "{elder} did not scold, but simply began to clean, slowly and alone, and {hero} felt ashamed.",
                '{pal} asked, "[If you do not, who will|Whose job is it, then]?"',
            ),
            (
                "{he} took a broom, cleaned until everything shone, and asked how else {he} could help.",
                "{he} came back, set it right, and made a list of small tasks that {he} kept every day.",
            ),
        ),
    ),
    "generosity": (
        Scene(
            (
                "{when}, {hero} had saved many coins to buy {thing}.",
                "{when}, {hero} had more {treat} than {he} could ever eat.",
            ),
            (
                "{he} [counted|looked at] them every night and gave nothing away.",
                "when {pal} asked for a little, {hero} said, [Maybe next time|I need it all].",
            ),
            (
                "then {he} heard that {pal} had no [supper|shoes|medicine], and {he} could not stop thinking about it.",
                '"[An open hand can also receive|What you give, you keep forever]," said {elder}.',
            ),
            (
                "{he} gave it all [with a smile|in secret], and the joy in those eyes was worth more than gold.",
                "{he} left a full basket at the door of {pal}, and {his} heart felt rich.",
            ),
        ),
        Scene(
            (
                "{when}, a poor traveler knocked on doors and asked for [a bed|a cup of water|some bread].",
                "{when}, the winter was hard, and {pal} had lost everything.",
            ),
            (
                "{hero} had only a little and wanted to [keep it|hide it].",
                '"I have so little myself," thought {hero}, and closed the [door|shutters].',
            ),
            (
                "but {he} remembered how {elder} once gave {him} a last [apple|blanket].",
                '{elder} said, "[It is not how much, but how gladly|Even a small gift can be great]."',
            ),
            (
                "{he} gave [{his} own scarf|half of {his} supper|{his} warm bed], and in spring the gift came back "
                "many times over.",
                "{he} gave gladly, others followed, and soon nobody was cold or hungry.",
            ),
        ),
        Scene(
            (
                "{when}, {pal} had a birthday, and {hero} had nothing to give but {thing} that {he} loved.",
                "{when}, {folk} collected gifts for {elder}, who was ill.",
            ),
            (
                "{hero} brought only [an old nut|a broken stick] and kept the best for {himself}.",
                "{hero} did not want to part with anything and [stayed at home|hid {his} treasures].",
            ),
            (
                "when {he} saw {pal} give away a favorite [toy|hat] with a smile, {he} felt small.",
                '"What would make them happy?" {he} asked {himself}, and {he} knew.',
            ),
            (
                "{he} ran home, wrapped {his} dearest treasure and gave it, and {he} had never been happier.",
                "{he} gave the very best {he} had, and everyone saw how {his} face [glowed|shone].",
            ),
        ),
    ),
    "respect": (
        Scene(
            (
                "{when}, {hero} [interrupted|laughed at] {elder}, who was telling an old story near {place}.",
                "{when}, {elder} asked {hero} not to [run|shout] near {place}.",
            ),
            (
                '"[You are old and slow|I do as I like]," {he} said, and {folk} [gasped|fell silent].',
                "{he} did not listen and [ran|shouted] even more.",
            ),
            (
                "soon {he} [got lost|fell into a pond], and it was {elder} who knew what to do.",
                '{pal} asked, "[Would you like to be spoken to like that|How do you want others to treat you]?"',
            ),
            (
                "{he} said sorry, sat down and listened, and the old story was the best {he} had ever heard.",
                '"Please teach me," {he} said politely, and {elder} did so with a smile.',
            ),
        ),
        Scene(
            (
                "{when}, {hero} made fun of the way {pal} [talked|ate|dressed].",
                "{when}, {pal} moved in near {place} and had [strange songs|different customs].",
            ),
            (
                "{he} copied {pal} and made the others laugh, and {pal} [went home|grew quiet].",
                '"Our way is the only right way," {he} said.',
            ),
            (
                "then {he} visited a strange place, and there everybody [stared|laughed] at {him}.",
                '{elder} said, "A {setting} with one color would be dull."',
            ),
            (
                "{he} asked {pal} to teach {him} a song, and {he} found it beautiful.",
                "{he} said sorry and asked many questions, and {pal} gladly told {him} about another world.",
            ),
        ),
        Scene(
            (
                "{when}, {hero} took {thing} from {pal} without asking.",
                "{when}, {hero} [picked the flowers|stepped on the beds] that {elder} had grown near {place}.",
            ),
            (
                '"What does it matter?" {he} [said|laughed], and did it again.',
                "{he} did not even notice how [sad|upset] the others were.",
            ),
            (
                "the next day someone [took|broke] something {he} loved, and now {he} knew how it felt.",
                '"Ask first, and most doors will open," said {elder}.',
            ),
            (
                "{he} gave it back, said please and thank you, and was welcome everywhere.",
                "{he} helped to put it right, and from then on {he} always asked first.",
            ),
        ),
    ),
    "trust": (
        Scene(
            (
                "{when}, {pal} told {hero} a secret and asked {him} to keep it.",
                "{when}, {pal} gave {hero} {thing} to keep safe.",
            ),
            (
                "but {hero} could not keep quiet and [told|whispered it to] everyone near {place}.",
                "but {hero} [lost it|gave it away] and said that it was not {his} fault.",
            ),
            (
                '"I believed in you," said {pal} with sad eyes, and {hero} felt very sorry.',
                '{elder} said, "It takes a long time to build, and only a moment to break."',
            ),
            (
                "{he} said sorry and kept every promise, big or small, until {pal} believed in {him} again.",
                "day after day {he} kept {his} word, and slowly {pal} came back to {him}.",
            ),
        ),
        Scene(
            (
                "{when}, {hero} had to cross a shaky bridge near {place}, and {pal} held out a paw.",
                "{when}, thick fog came, and {hero} could not find the way home from {place}.",
            ),
            (
                '"What if you let go?" {he} asked, and would not move.',
                "{he} did not believe {pal}, who knew the path, and walked in circles.",
            ),
            (
                '"I will not let you fall," said {pal}, [and meant it|calm and sure].',
                '{elder} called, "[Listen to your friend|Close your eyes and hold on]."',
            ),
            (
                "{he} took the paw, and step by step they [crossed|came home] together.",
                "{he} followed the voice of {pal}, and soon {he} saw the warm lights of the {setting}.",
            ),
        ),
        Scene(
            (
                '"Help, help, a wolf!" {hero} called {when}, and everyone came running to {place}, but there was none.',
                "{when}, {hero} played a trick and told {folk} that {place} was on fire.",
            ),
            (
                "{he} laughed and did it again the next day, and once more they came for nothing.",
                "they were [cross|tired], and when {he} really needed help, nobody came.",
            ),
            (
                '"Nobody believes me now," {he} [cried|sobbed], and {elder} answered, "Then begin to earn it."',
                "only {pal} came at last, and {hero} promised never to trick anyone again.",
            ),
            (
                "from then on {he} only said what was true, and little by little they believed {him} again.",
                "{he} said sorry to each of them, kept {his} word, and one day they called on {him} for help.",
            ),
        ),
    ),
}
