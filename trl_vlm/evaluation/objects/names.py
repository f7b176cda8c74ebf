"""The 80 classes of COCO and words for them, in the singular: other names, and kinds of them (our own list).

A line is a class and its words; names in several words win over their parts, so "hot dog" is no dog.
"""

_TABLE = """
person, people, man, woman, boy, girl, child, kid, baby, toddler, infant, adult, teenager, teen, youth, lady,
    gentleman, guy, human, pedestrian, passerby, bystander, onlooker, spectator, audience, crowd, player,
    athlete, skater, skateboarder, surfer, skier, snowboarder, swimmer, runner, jogger, rider, cyclist,
    bicyclist, biker, motorcyclist, driver, passenger, commuter, traveler, traveller, tourist, batter, catcher,
    umpire, referee, golfer, goalie, goalkeeper, coach, teammate, bride, groom, officer, policeman, policewoman,
    cop, fireman, firefighter, soldier, guard, sailor, pilot, chef, baker, waiter, waitress, bartender, vendor,
    worker, employee, farmer, fisherman, hunter, cowboy, jockey, shepherd, student, teacher, pupil, classmate,
    friend, family, mother, father, mom, mum, dad, daughter, son, brother, sister, sibling, grandmother,
    grandfather, grandma, grandpa, aunt, uncle, husband, wife, businessman, businesswoman, shopper, customer,
    clerk, doctor, nurse, dentist, photographer, musician, singer, dancer, actor, performer, speaker, presenter,
    artist, clown, monk, nun, priest, police officer, snow boarder, skate boarder, bike rider, horse rider
bicycle, bike, mountain bike, tricycle, unicycle
car, automobile, sedan, van, minivan, suv, jeep, taxi, taxicab, cab, hatchback, limousine, limo, convertible,
    station wagon, police car, race car, sports car, hearse
motorcycle, motorbike, motor bike, motor cycle, moped, scooter, motor scooter, dirt bike
airplane, plane, aeroplane, air plane, aircraft, jet, jetliner, airliner, jumbo jet, biplane, seaplane, fighter
    jet, propeller plane
bus, minibus, school bus, tour bus, double decker, trolleybus
train, locomotive, tram, streetcar, caboose, steam engine, train car, subway train, monorail
truck, lorry, pickup, pick up truck, pickup truck, fire truck, firetruck, fire engine, semi truck, tow truck,
    dump truck, garbage truck, food truck, semi trailer, tractor trailer
boat, ship, sailboat, sail boat, rowboat, row boat, canoe, kayak, ferry, yacht, dinghy, raft, gondola, barge,
    tugboat, tug boat, speedboat, speed boat, motorboat, motor boat, catamaran, cruise ship, steamboat,
    houseboat, fishing boat
traffic light, traffic signal, stoplight, stop light, trafficlight, traffic lamp
fire hydrant, hydrant, firehydrant, fire plug
stop sign, stopsign
parking meter, parkingmeter
bench, pew, park bench
bird, duck, duckling, goose, gosling, swan, gull, seagull, sea gull, pigeon, dove, sparrow, robin, finch, crow,
    raven, magpie, parrot, parakeet, cockatoo, macaw, owl, eagle, hawk, falcon, vulture, ostrich, emu, peacock,
    penguin, pelican, heron, stork, flamingo, hummingbird, woodpecker, hen, rooster, chick, blue jay, cormorant,
    canary, kingfisher
cat, kitten, kitty, tomcat, tabby, house cat
dog, puppy, pup, hound, poodle, terrier, bulldog, beagle, collie, dachshund, retriever, labrador, dalmatian,
    chihuahua, spaniel, husky, pug, mutt, corgi, german shepherd, sheepdog
horse, pony, foal, colt, mare, stallion, racehorse
sheep, lamb, ewe, ram
cow, cattle, calf, bull, ox, heifer, bullock
elephant, mammoth
bear, panda, polar bear, grizzly, grizzly bear, brown bear, black bear, bear cub, panda bear
zebra
giraffe
backpack, back pack, rucksack, knapsack, school bag
umbrella, parasol, beach umbrella
handbag, hand bag, purse, tote bag, clutch bag, shoulder bag
tie, necktie, neck tie, bow tie, bowtie
suitcase, suit case, luggage, briefcase, travel bag
frisbee, flying disc, flying disk
skis, ski
snowboard, snow board
sports ball, ball, soccer ball, tennis ball, beach ball, golf ball, volley ball, bowling ball, football ball
kite
baseball bat, bat
baseball glove, mitt, baseball mitt, catcher mitt, catchers mitt
skateboard, skate board, longboard
surfboard, surf board, body board, bodyboard, boogie board, paddle board, paddleboard
tennis racket, racket, racquet, tennis racquet
bottle, wine bottle, beer bottle, water bottle
wine glass, wineglass, goblet, champagne glass, champagne flute
cup, mug, teacup, tea cup, coffee cup, coffee mug, paper cup
fork
knife, butter knife, pocketknife, pocket knife, steak knife, cleaver
spoon, teaspoon, tablespoon, soup spoon
bowl, soup bowl, salad bowl, mixing bowl
banana
apple
sandwich, hamburger, burger, cheeseburger, panini, submarine sandwich, blt
orange, tangerine, mandarin, clementine
broccoli
carrot
hot dog, hotdog, frankfurter
pizza
donut, doughnut, donut hole
cake, cupcake, cup cake, cheesecake, birthday cake, wedding cake, shortcake, layer cake
chair, seat, stool, armchair, arm chair, recliner, highchair, high chair, rocking chair, lawn chair, office
    chair, desk chair, beach chair, folding chair, wheelchair, wheel chair
couch, sofa, loveseat, love seat, settee, futon, divan
potted plant, houseplant, house plant, pottedplant, potted flower, potted tree, plant pot
bed, bunk bed, bunkbed, crib, cot, mattress
dining table, table, diningtable, kitchen table, coffee table, desk, picnic table, end table, side table, dinner
    table
toilet, urinal, commode, lavatory, toilet bowl, toilet seat, potty
tv, television, tvmonitor, tv monitor, tv set, television set, tv screen, flat screen, monitor, computer monitor
laptop, laptop computer, notebook computer, macbook
mouse, computer mouse
remote, remote control, tv remote, remote controller, wii remote, game controller
keyboard, computer keyboard
cell phone, cellphone, phone, telephone, smartphone, smart phone, mobile phone, iphone
microwave, microwave oven
oven, stove, stovetop, stove top, cooker
toaster, toaster oven
sink, washbasin, wash basin, basin
refrigerator, fridge, freezer, refridgerator
book, textbook, novel, cookbook, paperback
clock, wall clock, alarm clock, grandfather clock
vase, flower vase
scissors, scissor, shears
teddy bear, teddy, teddybear, stuffed bear, stuffed animal, stuffed toy, plush toy, plush bear, toy bear
hair drier, hair dryer, hairdryer, hairdrier, blow dryer, blow drier, hair blower
toothbrush, tooth brush
"""


def _synonyms(table: str) -> dict[str, list[str]]:
    """Class to other words for it."""
    rows = [line.split(", ") for line in table.strip().replace("\n    ", " ").splitlines()]
    return {name: words for name, *words in rows}


SYNONYMS = _synonyms(_TABLE)

# Animals of which "a baby ..." or "an adult ..." is one animal and no person.
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
AGES = ("baby", "adult")

# Names of which a part would be found, and that are another thing: they name no object.
OTHER_THINGS = (
    "home plate", "train track", "railroad train track", "baby animal", "adult animal", "baby cub", "adult cub",
)  # fmt: skip

# "passenger jet" is one airplane, and its passenger no person.
JOINED = {"passenger jet": "airplane", "passenger plane": "airplane", "passenger train": "train"}

IRREGULAR_PLURALS = {
    "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "oxen": "ox",
    "calves": "calf", "knives": "knife", "wolves": "wolf", "policemen": "policeman", "policewomen": "policewoman",
    "firemen": "fireman", "fishermen": "fisherman", "businessmen": "businessman", "gentlemen": "gentleman",
    "businesswomen": "businesswoman", "passersby": "passerby", "wives": "wife",
}  # fmt: skip
