"""The words that the demo's generators draw from, and the inventor of words that nobody has seen.

Plain lists of lower-case English words (what a speech recogniser on a watch would hand over), and `invent`, which
builds pronounceable words from syllables. Every word that `invent` can build belongs to exactly one of two sides,
decided by its SHA-256: seven eighths may appear in pretraining and in training data, one eighth appears in the test
of new strings only. Nothing here depends on `hash()`, on the clock or on the machine.
"""

from __future__ import annotations

import hashlib
import random


def split_words(text: str) -> list[str]:
    """The words of a text that was written out over several lines."""
    return text.split()


NAMES = split_words("""
anna ben carla david emma felix greta henry irene jack karen leo maria nina oscar paula quentin rosa simon tina ursula
victor wendy xavier yasmin zoe adam bella chris diana eric fiona george hanna ivan julia kevin laura martin nora oliver
petra robert sara thomas una vera walter alice boris clara dominic elena frank gloria hugo ida james kate lucas mia
nathan olga peter rita stefan teresa ugo valentina william agnes bruno cecilia daniel edith fabian gina harold isabel
joseph klara lina marco natalie otto patricia ralph sophia theo vincent wanda albert barbara conrad dora edgar flora
gustav helen igor jenny kurt lena max noah ophelia paul rachel samuel tara viola yuri amir bianca cyrus delia elias
farah gabriel hazel imran jasmine khalid leila mateo nadia omar priya rafael samira tariq uma vikram yara zain arjun
beatriz carmen diego esther fatima gonzalo hiroshi ines jorge kenji lucia miguel naomi pablo renata sergio tomoko
alina bogdan dmitri ewa filip grzegorz halina jakub kasia ludmila milos natasha pavel sasha tomas vlad zuzana
astrid bjorn freya gunnar hilda ingrid lars magnus olaf sigrid sven torsten erik kirsten mads rasmus signe
aidan brigid callum deirdre eoin fergus maeve niall rory sean sinead megan rhys dylan owen gareth
mum dad grandma grandpa
""")

SURNAMES = split_words("""
rossi smith miller garcia novak jensen weber silva brown keller moreau kowalski tanaka singh khan lopez fischer berg
larsen hughes murphy clarke walker young king wright hill scott green baker adams nelson carter mitchell turner parker
collins edwards stewart morris rogers cook morgan bell cooper bailey reed kelly howard ward cox richardson wood watson
brooks bennett gray hayes price wagner becker hoffman schulz koch bauer richter klein wolf schroeder neumann braun
lange krause lehmann schmitt hartmann kruger romano colombo ricci marino greco bruno gallo conti costa fontana
""")

CITIES = split_words("""
rome oslo paris berlin madrid lisbon vienna prague warsaw dublin london athens budapest helsinki stockholm copenhagen
brussels amsterdam zurich geneva milan naples turin venice florence bologna palermo munich hamburg cologne frankfurt
leipzig dresden lyon marseille nice bordeaux toulouse barcelona valencia seville bilbao porto krakow gdansk brno
bratislava ljubljana zagreb split belgrade sofia bucharest istanbul ankara cairo tunis casablanca nairobi lagos accra
dakar tokyo osaka kyoto seoul beijing shanghai delhi mumbai chennai kolkata bangkok hanoi manila jakarta singapore
sydney melbourne perth brisbane auckland wellington toronto montreal vancouver boston chicago denver dallas houston
seattle portland austin phoenix miami atlanta detroit cleveland memphis nashville orlando lima quito bogota santiago
havana bergen tromso malmo aarhus turku tampere tallinn riga vilnius minsk kyiv odessa leeds bristol cardiff glasgow
edinburgh york oxford cambridge bath brighton exeter norwich cork galway limerick
""")

PLACES = """
station|airport|library|museum|hospital|pharmacy|bakery|supermarket|post office|town hall|swimming pool|
football stadium|city park|main square|old harbour|bus stop|train station|art gallery|book shop|coffee shop|dentist|
gym|office|school|university|cinema|theatre|zoo|castle|beach|market|bank|petrol station|car park|hotel|church|
bridge|lake|garden centre|police station|concert hall|ferry terminal|sports centre|shoe shop|flower shop|butcher|
hairdresser|bike shop
""".replace("\n", "").split("|")

THINGS = """
milk|bread|butter|eggs|cheese|apples|bananas|oranges|lemons|grapes|pears|tomatoes|potatoes|carrots|onions|garlic|rice|
pasta|flour|sugar|salt|pepper|honey|jam|coffee|tea|juice|water|olive oil|oat milk|yoghurt|cream|chicken|fish|ham|beans|
lentils|nuts|chocolate|biscuits|soap|shampoo|toothpaste|batteries|candles|matches|light bulbs|paper towels|dog food|
cat litter|stamps|envelopes|a notebook|a pencil|a lamp|a ladder|a hammer|nails|paint|tape|rope|gloves|socks|a scarf|
an umbrella|a hat|flowers|a plant|a pot|plates|cups|spoons|forks|knives|a kettle|a pillow|a blanket|towels|sheets
""".replace("\n", "").split("|")

CHORES = """
water the plants|feed the cat|walk the dog|take out the rubbish|pay the rent|wash the car|clean the kitchen|buy stamps|
do the laundry|iron the shirts|empty the dishwasher|defrost the fridge|lock the door|close the windows|
turn off the oven|check the mail|charge the phone|back up the laptop|renew the passport|book the dentist|
pick up the parcel|return the books|order new glasses|take the pills|drink some water|stretch my legs|
read the contract|sign the form|print the tickets|pack the suitcase|cancel the gym|thank the neighbours|
fix the bike|change the sheets|mow the lawn|rake the leaves|bake a cake|soak the beans|thaw the chicken|
peel the potatoes|practise the piano|study the map|write the report|send the invoice|finish the slides|
test the alarm|clean the filter|fill the tank|check the tyres|vacuum the stairs
""".replace("\n", "").split("|")

REMARKS = """
i am on my way|i will be late|dinner is ready|the train is delayed|see you tomorrow|happy birthday|good luck today|
thank you so much|i am stuck in traffic|the meeting is over|i forgot my keys|please bring some bread|we are at the door|
the parcel has arrived|i will call you later|do not wait for me|the kids are asleep|it is raining here|
i found the ticket|we need more milk|the doctor said yes|i got the job|the flight has landed|have a nice trip|
sleep well|get well soon|the shop is closed|i left early|the car is fixed|we won the match|the film was great|
i miss you|congratulations to you both|the soup is on the stove|i am nearly home|lunch was lovely|
the bus never came|save me a seat|the keys are under the mat|let us meet at the bridge
""".replace("\n", "").split("|")

SONGS = """
blue river|silver moon|paper boats|the long road|summer rain|golden hour|midnight train|broken clock|wild horses|
open sky|northern lights|velvet sea|city of glass|the last dance|morning bird|quiet storm|red balloon|winter song|
empty streets|dancing shadows|ocean drive|stone garden|burning bridges|sweet water|lonely lighthouse|electric heart|
falling leaves|a thousand miles|the old mill|crystal palace|desert wind|hidden valley|lucky star|mountain echo|
neon rain|orange tree|painted doors|rolling thunder|secret harbour|tin soldier|under the bridge|violet evening|
waiting for you|yellow kite
""".replace("\n", "").split("|")

BANDS = """
the lanterns|the red foxes|paper tigers|the night owls|silver spoon|the wild geese|three sailors|the clockmakers|
river brothers|the hollow men|green parade|the daydreamers|cold harbour|the sparrows|black umbrella|the travellers|
sunday drivers|the glass bees|old maps|the weather girls|northern line|the postmen|velvet engine|the gardeners
""".replace("\n", "").split("|")

EVENTS = """
dentist|haircut|team meeting|yoga class|piano lesson|lunch with anna|job interview|parents evening|book club|
dinner party|doctor|football practice|board meeting|birthday party|car service|eye test|concert|wedding|
choir rehearsal|swimming lesson|house viewing|project review|coffee with ben|language class|vet|staff party|exam|
flight to rome|budget call|chess club
""".replace("\n", "").split("|")

SPORTS = split_words(
    "running cycling swimming rowing walking hiking yoga boxing tennis football skating dancing climbing skiing "
    "pilates golf basketball badminton"
)
ROOMS = [
    "kitchen",
    "bedroom",
    "bathroom",
    "living room",
    "hall",
    "garage",
    "office",
    "attic",
    "cellar",
    "garden",
    "nursery",
    "balcony",
]
LANGUAGES = split_words("french german spanish italian polish dutch swedish greek turkish portuguese japanese danish")
PHRASES = """
good morning|good night|thank you|where is the station|how much is it|i am hungry|see you later|i do not understand|
the bill please|i am lost|what time is it|nice to meet you|i need a doctor|happy new year|can you help me|
one coffee please|two tickets please|i would like a room|excuse me|have a good day
""".replace("\n", "").split("|")
ANIMALS = split_words(
    "dog cat horse rabbit parrot hamster goat pony turtle donkey sheep duck goose mouse canary lizard"
)
COLOURS = split_words("red blue green yellow black white orange purple pink brown grey silver")
JOBS = split_words(
    "baker teacher nurse pilot farmer painter plumber lawyer driver singer writer tailor gardener doctor waiter "
    "carpenter dentist cook librarian mechanic"
)
ADJECTIVES = split_words(
    "old new small large quiet noisy bright dark warm cold heavy light clean dusty round broken cheap pretty "
    "slow quick "
    "soft empty full narrow wide friendly tired happy strange simple"
)
NOUNS = split_words(
    "table chair window door house street garden river bridge train bus car bicycle boat letter book map "
    "photo clock radio "
    "phone bottle basket box bag coat shoe ring coin key cup plate spoon lamp mirror carpet piano guitar drum "
    "ball kite "
    "tree flower leaf stone hill lake island field farm village market shop school tower wall roof fence gate "
    "path road "
    "cloud storm wind snow rain sun moon star morning evening summer winter soup cake sandwich salad dinner breakfast"
)
VERBS_PAST = split_words(
    "found lost bought sold painted cleaned opened closed carried dropped borrowed returned fixed broke "
    "washed moved saw "
    "liked wanted needed kept hid brought sent showed took"
)

ONSETS = split_words(
    "b c d f g h j k l m n p r s t v w z br cr dr fr gr pr tr bl cl fl gl pl sl st sp sk sn sm sw th sh ch qu kn"
)
VOWELS = split_words("a e i o u a e i o a e i o ai ea ee ie oa ou io ia")
CODAS = ["", "", "", "", "", "n", "r", "l", "s", "m", "t", "k", "d", "x", "nd", "rt", "st", "ck", "ll", "ng"]

HELD_OUT_SHARE = 32  # of 256: the words whose SHA-256 begins with a smaller byte


def is_held_out(word: str) -> bool:
    """Whether an invented word belongs to the test of new strings: the first byte of its SHA-256 is below 32."""
    return hashlib.sha256(word.encode()).digest()[0] < HELD_OUT_SHARE


def invent(rng: random.Random, *, held_out: bool = False) -> str:
    """A pronounceable word of one to four syllables, such as "tavora", from the side asked for.

    Args:
        rng: The source of randomness.
        held_out: False for a word that training may see, True for one that only the test of new strings may use.
    """
    while True:
        syllables = rng.choice((1, 2, 2, 2, 3, 3, 3, 4))
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)
        if 3 <= len(word) <= 12 and is_held_out(word) == held_out:
            return word
