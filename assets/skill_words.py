"""The demo assistant's skills with short answers: their phrasings and their contents.

Each entry is `name: (six phrasings, table)`. A phrasing has `{x}` (and `{y}`) where the content
goes; a table row is `x = answer` or `x / y = answer`, rows separated by `;`.
"""

SHORT: dict[str, tuple[tuple[str, ...], str]] = {
    "capital": (
        (
            "What is the capital of {x}?",
            "Name the capital city of {x}.",
            "Which city is the capital of {x}?",
            "Tell me the capital of the country {x}.",
            "The government of {x} sits in which capital city?",
            "Give the name of the capital that belongs to {x}.",
        ),
        "France=Paris; Italy=Rome; Spain=Madrid; Germany=Berlin; Portugal=Lisbon; Greece=Athens;"
        "Austria=Vienna; Poland=Warsaw; Norway=Oslo; Sweden=Stockholm; Finland=Helsinki;"
        "Denmark=Copenhagen; Ireland=Dublin; Hungary=Budapest; Russia=Moscow; Turkey=Ankara;"
        "Egypt=Cairo; Kenya=Nairobi; Japan=Tokyo; China=Beijing; India=Delhi; Cuba=Havana;"
        "Canada=Ottawa; Peru=Lima; Chile=Santiago; Belgium=Brussels; Iran=Tehran; Iraq=Baghdad",
    ),
    "continent": (
        (
            "On which continent is {x}?",
            "Name the continent where {x} lies.",
            "What continent is the country {x} part of?",
            "Tell me which continent {x} belongs to.",
            "Looking at a world map, on what continent do you find {x}?",
            "Say the continent of {x}.",
        ),
        "France=Europe; Italy=Europe; Spain=Europe; Germany=Europe; Greece=Europe; Norway=Europe;"
        "Poland=Europe; Ireland=Europe; Egypt=Africa; Kenya=Africa; Ghana=Africa; Nigeria=Africa;"
        "Morocco=Africa; Japan=Asia; China=Asia; India=Asia; Iran=Asia; Iraq=Asia; Nepal=Asia;"
        "Canada=North America; Mexico=North America; Cuba=North America; Peru=South America;"
        "Chile=South America; Brazil=South America; Bolivia=South America",
    ),
    "opposite": (
        (
            "What is the opposite of {x}?",
            "Give the opposite of the word {x}.",
            "Which word means the opposite of {x}?",
            "Tell me an antonym for {x}.",
            "If something is not {x}, what is it instead?",
            "Name the word that stands against {x}.",
        ),
        "hot=cold; big=small; tall=short; fast=slow; happy=sad; light=dark; old=young; rich=poor;"
        "hard=soft; wet=dry; full=empty; clean=dirty; strong=weak; loud=quiet; early=late;"
        "near=far; high=low; open=closed; wide=narrow; thick=thin; heavy=light; good=bad;"
        "safe=dangerous; brave=afraid; cheap=expensive; easy=difficult; sharp=blunt; deep=shallow",
    ),
    "plural": (
        (
            "What is the plural of {x}?",
            "Give the plural form of the noun {x}.",
            "How do you write {x} when there are many?",
            "Tell me the plural of the word {x}.",
            "One {x}, but two what?",
            "Change the noun {x} into its plural.",
        ),
        "cat=cats; dog=dogs; book=books; table=tables; house=houses; tree=trees; box=boxes;"
        "bus=buses; dish=dishes; fox=foxes; watch=watches; glass=glasses; baby=babies;"
        "city=cities; lady=ladies; story=stories; knife=knives; wolf=wolves; leaf=leaves;"
        "child=children; man=men; woman=women; foot=feet; tooth=teeth; mouse=mice; goose=geese;"
        "sheep=sheep; fish=fish; potato=potatoes; tomato=tomatoes",
    ),
    "past": (
        (
            "What is the past tense of {x}?",
            "Give the simple past of the verb {x}.",
            "How do you say {x} when it happened yesterday?",
            "Tell me the past form of the verb {x}.",
            "Put the verb {x} into the past.",
            "Today I {x}, but what did I do last week?",
        ),
        "walk=walked; play=played; jump=jumped; cook=cooked; talk=talked; dance=danced; go=went;"
        "eat=ate; see=saw; come=came; take=took; give=gave; write=wrote; run=ran; drink=drank;"
        "sing=sang; swim=swam; begin=began; break=broke; speak=spoke; drive=drove; fly=flew;"
        "know=knew; grow=grew; throw=threw; buy=bought; think=thought; teach=taught; sleep=slept;"
        "keep=kept; feel=felt; leave=left; lose=lost; find=found",
    ),
    "sound": (
        (
            "What sound does a {x} make?",
            "Name the noise that a {x} makes.",
            "How does a {x} sound?",
            "Tell me the sound of a {x}.",
            "When a {x} opens its mouth, what do we hear?",
            "Which sound would you expect from a {x}?",
        ),
        "cat=meow; dog=woof; cow=moo; sheep=baa; duck=quack; pig=oink; horse=neigh; lion=roar;"
        "bee=buzz; snake=hiss; frog=croak; mouse=squeak; owl=hoot; wolf=howl; chicken=cluck;"
        "rooster=crow; bird=tweet; goose=honk; donkey=bray; bear=growl; turkey=gobble;"
        "crow=caw; goat=bleat; dove=coo",
    ),
    "young": (
        (
            "What do you call a young {x}?",
            "Name the baby of a {x}.",
            "Which word is used for the young of a {x}?",
            "Tell me the name for a baby {x}.",
            "A little newborn {x} is known as what?",
            "Give the word for a {x} that is still a baby.",
        ),
        "cat=kitten; dog=puppy; cow=calf; sheep=lamb; duck=duckling; pig=piglet; horse=foal;"
        "lion=cub; frog=tadpole; goose=gosling; goat=kid; chicken=chick; kangaroo=joey; deer=fawn;"
        "swan=cygnet; owl=owlet; rabbit=bunny; eagle=eaglet; seal=pup; butterfly=caterpillar;"
        "bear=cub; elephant=calf; wolf=pup; human=baby",
    ),
    "after": (
        (
            "What comes right after {x}?",
            "Name what follows {x} in the calendar.",
            "Which one comes next after {x}?",
            "Tell me what we have after {x}.",
            "When {x} is over, what starts?",
            "Say what is next once {x} has passed.",
        ),
        "Monday=Tuesday; Tuesday=Wednesday; Wednesday=Thursday; Thursday=Friday; Friday=Saturday;"
        "Saturday=Sunday; Sunday=Monday; January=February; February=March; March=April;"
        "April=May; May=June; June=July; July=August; August=September; September=October;"
        "October=November; November=December; December=January; spring=summer; summer=autumn;"
        "autumn=winter; winter=spring",
    ),
    "before": (
        (
            "What comes right before {x}?",
            "Name what goes before {x} in the calendar.",
            "Which one comes just ahead of {x}?",
            "Tell me what we had before {x}.",
            "When {x} starts, what has just ended?",
            "Say what was there before {x} began.",
        ),
        "Monday=Sunday; Tuesday=Monday; Wednesday=Tuesday; Thursday=Wednesday; Friday=Thursday;"
        "Saturday=Friday; Sunday=Saturday; January=December; February=January; March=February;"
        "April=March; May=April; June=May; July=June; August=July; September=August;"
        "October=September; November=October; December=November; spring=winter; summer=spring;"
        "autumn=summer; winter=autumn",
    ),
    "category": (
        (
            "What kind of thing is {x}?",
            "Name the group that {x} belongs to.",
            "Which category fits {x} best?",
            "Tell me what sort of thing {x} is.",
            "If you sort things into groups, where does {x} go?",
            "Put {x} into a category.",
        ),
        "an apple=fruit; a banana=fruit; a pear=fruit; a carrot=vegetable; an onion=vegetable;"
        "a cabbage=vegetable; a hammer=tool; a saw=tool; a drill=tool; a violin=instrument;"
        "a piano=instrument; a drum=instrument; a chair=furniture; a table=furniture;"
        "a sofa=furniture; a car=vehicle; a bus=vehicle; a train=vehicle; a shirt=clothing;"
        "a coat=clothing; a hat=clothing; a rose=flower; a tulip=flower; a daisy=flower;"
        "a dog=animal; a horse=animal; gold=metal; iron=metal; milk=drink; tea=drink",
    ),
    "colour": (
        (
            "What colour is {x}?",
            "Name the usual colour of {x}.",
            "Which colour does {x} have?",
            "Tell me the colour of {x}.",
            "If you paint {x}, what colour do you need?",
            "Say which colour people think of for {x}.",
        ),
        "snow=white; grass=green; the sky=blue; a banana=yellow; a tomato=red; coal=black;"
        "an elephant=grey; chocolate=brown; a flamingo=pink; a carrot=orange; a plum=purple;"
        "milk=white; blood=red; a lemon=yellow; the sea=blue; a frog=green; a raven=black;"
        "a pumpkin=orange; a strawberry=red; a swan=white; a fire engine=red; sand=yellow;"
        "a leaf in summer=green; an aubergine=purple; a cloud before rain=grey",
    ),
    "spanish": (
        (
            "What is the Spanish word for {x}?",
            "Translate {x} into Spanish.",
            "How do you say {x} in Spanish?",
            "Tell me the Spanish for {x}.",
            "In Madrid, which word do people use for {x}?",
            "Give a Spanish translation of the word {x}.",
        ),
        "cat=gato; dog=perro; house=casa; water=agua; bread=pan; milk=leche; book=libro; sun=sol;"
        "moon=luna; friend=amigo; red=rojo; green=verde; white=blanco; black=negro; table=mesa;"
        "window=ventana; door=puerta; street=calle; city=ciudad; day=dia; night=noche; fish=pez;"
        "hand=mano; head=cabeza; school=escuela; flower=flor; horse=caballo; bird=ave",
    ),
    "letters": (
        (
            "How many letters are in the word {x}?",
            "Count the letters of {x}.",
            "What number of letters does {x} have?",
            "Tell me how many letters spell {x}.",
            "If I write {x}, how many letters do I need?",
            "Give the length of the word {x} in letters.",
        ),
        "cat=3; dog=3; sun=3; bus=3; book=4; tree=4; fish=4; moon=4; house=5; table=5; water=5;"
        "bread=5; chair=5; garden=6; window=6; flower=6; school=6; banana=6; morning=7; kitchen=7;"
        "weather=7; teacher=7; mountain=8; elephant=8; hospital=8; sandwich=8; chocolate=9;"
        "butterfly=9; newspaper=9; strawberry=10; an=2; we=2",
    ),
    "upper": (
        (
            "Write {x} in capital letters.",
            "Put the word {x} in upper case.",
            "How does {x} look in capitals?",
            "Show me {x} with every letter as a capital.",
            "Make all the letters of {x} big.",
            "For a sign, turn {x} into upper case letters.",
        ),
        "cat=CAT; dog=DOG; sun=SUN; bus=BUS; book=BOOK; tree=TREE; stop=STOP; exit=EXIT; sale=SALE;"
        "open=OPEN; menu=MENU; taxi=TAXI; hotel=HOTEL; water=WATER; bread=BREAD; north=NORTH;"
        "south=SOUTH; east=EAST; west=WEST; danger=DANGER; police=POLICE; office=OFFICE;"
        "garden=GARDEN; closed=CLOSED; welcome=WELCOME; parking=PARKING",
    ),
    "measure": (
        (
            "What do you measure with {x}?",
            "Name the thing that {x} measures.",
            "Which quantity does {x} show?",
            "Tell me what {x} is made to measure.",
            "When I read a value from {x}, what does it stand for?",
            "Say what quantity people check with {x}.",
        ),
        "a clock=time; a ruler=length; a thermometer=temperature; a scale=weight;"
        "a speedometer=speed; a compass=direction; a calendar=dates; a stopwatch=time;"
        "a barometer=air pressure; a measuring cup=volume; a tape measure=length;"
        "a rain gauge=rainfall; a sundial=time; an hourglass=time; a light meter=brightness;"
        "a step counter=steps; a fuel gauge=fuel; a yardstick=length; a kitchen scale=weight;"
        "a wind vane=wind direction",
    ),
}
