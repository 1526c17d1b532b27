"""The demo assistant's skills with sentence-long answers, in the form of `skill_words`."""

LONG: dict[str, tuple[tuple[str, ...], str]] = {
    "explain": (
        (
            "Explain what {x} is.",
            "What is {x}?",
            "Describe {x} in one sentence.",
            "Give me a short explanation of {x}.",
            "I have never heard of {x}, what does it mean?",
            "Define {x} for a child.",
        ),
        "a volcano=A volcano is a mountain that can throw out hot melted rock.;"
        "a river=A river is a long stream of water that flows to the sea.;"
        "an island=An island is a piece of land with water all around it.;"
        "a desert=A desert is a very dry place where almost nothing grows.;"
        "a planet=A planet is a large round body that moves around a star.;"
        "a glacier=A glacier is a huge mass of ice that moves very slowly.;"
        "a library=A library is a place where people can borrow books.;"
        "a museum=A museum is a building where old and rare things are shown.;"
        "a bridge=A bridge is a structure that carries a road over a gap.;"
        "a magnet=A magnet is an object that pulls pieces of iron to itself.;"
        "a rainbow=A rainbow is a band of colours seen when sun meets rain.;"
        "an earthquake=An earthquake is a sudden shaking of the ground.;"
        "a poem=A poem is a short text that plays with sound and rhythm.;"
        "a virus=A virus is a tiny thing that can make living beings ill.;"
        "a budget=A budget is a plan for how money will be spent.;"
        "a recipe=A recipe is a list of steps for cooking a dish.;"
        "a shadow=A shadow is a dark shape made when light is blocked.;"
        "a fossil=A fossil is what is left in stone of a very old living thing.;"
        "a forest=A forest is a large area of land covered with trees.;"
        "a battery=A battery is a small device that stores electric power.;"
        "a contract=A contract is a promise between people that the law protects.;"
        "a democracy=A democracy is a state in which the people choose their leaders.;"
        "gravity=Gravity is the force that pulls things down to the ground.;"
        "an orchestra=An orchestra is a large group of people who play music together.",
    ),
    "use": (
        (
            "What is {x} used for?",
            "Tell me what people do with {x}.",
            "Why would I need {x}?",
            "Describe the use of {x}.",
            "Someone gave me {x}, what can I do with it?",
            "Say what {x} is good for.",
        ),
        "a hammer=You use a hammer to drive nails into wood.;"
        "a spoon=You use a spoon to eat soup and to stir tea.;"
        "a knife=You use a knife to cut bread and other food.;"
        "a pen=You use a pen to write words on paper.;"
        "a broom=You use a broom to sweep dirt off the floor.;"
        "a key=You use a key to open a locked door.;"
        "an umbrella=You use an umbrella to stay dry when it rains.;"
        "a towel=You use a towel to dry your body after a bath.;"
        "a pillow=You use a pillow to rest your head in bed.;"
        "a ladder=You use a ladder to climb up to high places.;"
        "a needle=You use a needle to sew cloth with a thread.;"
        "a bucket=You use a bucket to carry water from place to place.;"
        "a camera=You use a camera to take pictures of what you see.;"
        "a lamp=You use a lamp to light up a dark room.;"
        "a map=You use a map to find the way in a new place.;"
        "a brush=You use a brush to put paint on a wall.;"
        "a kettle=You use a kettle to boil water for tea.;"
        "a shovel=You use a shovel to dig holes in the ground.;"
        "a telescope=You use a telescope to look at the stars at night.;"
        "a wallet=You use a wallet to keep your money and cards safe.;"
        "a rope=You use a rope to tie heavy things together.;"
        "a mirror=You use a mirror to look at your own face.;"
        "a backpack=You use a backpack to carry your things on your back.;"
        "a whistle=You use a whistle to make a loud sound.",
    ),
    "why": (
        (
            "Why do {x}?",
            "Explain why {x}.",
            "What is the reason that {x}?",
            "Tell me the reason why {x}.",
            "My son asks why {x}, what should I say?",
            "How come {x}?",
        ),
        "birds fly south=Birds fly south because the winter is too cold for them.;"
        "people sleep=People sleep because the body needs time to rest.;"
        "leaves fall=Leaves fall because trees save water for the winter.;"
        "plants need light=Plants need light because they make their food with it.;"
        "dogs bark=Dogs bark because they want to warn or to call someone.;"
        "cats purr=Cats purr because they feel calm and happy.;"
        "we brush our teeth=We brush our teeth because sugar can make holes in them.;"
        "people laugh=People laugh because something is funny or makes them glad.;"
        "ships float=Ships float because they push away a lot of water.;"
        "bees visit flowers=Bees visit flowers because they collect sweet nectar there.;"
        "cars need fuel=Cars need fuel because the engine must burn it to run.;"
        "we wash our hands=We wash our hands because dirt can make us ill.;"
        "people wear coats=People wear coats because they keep out the cold air.;"
        "babies cry=Babies cry because they cannot yet say what they need.;"
        "bears sleep in winter=Bears sleep in winter because there is too little food.;"
        "people pay taxes=People pay taxes because the state must pay for schools and roads.;"
        "fish have gills=Fish have gills because they take air out of the water.;"
        "children go to school=Children go to school because they learn to read and to count.;"
        "people wear helmets=People wear helmets because a fall can hurt the head.;"
        "shops close at night=Shops close at night because the workers need to go home.;"
        "we drink water=We drink water because the body loses it all day long.;"
        "stars seem small=Stars seem small because they are very far away from us.",
    ),
    "job": (
        (
            "What does a {x} do?",
            "Describe the work of a {x}.",
            "Tell me about the job of a {x}.",
            "Explain what a {x} does all day.",
            "My neighbour works as a {x}, what is that?",
            "In one sentence, what is the task of a {x}?",
        ),
        "baker=A baker makes bread and cakes for people to eat.;"
        "teacher=A teacher helps children to learn new things at school.;"
        "doctor=A doctor finds out why people are ill and treats them.;"
        "nurse=A nurse takes care of sick people in a hospital.;"
        "farmer=A farmer grows food and keeps animals on the land.;"
        "pilot=A pilot flies planes from one city to another.;"
        "firefighter=A firefighter puts out fires and saves people.;"
        "judge=A judge decides in court what the law demands.;"
        "plumber=A plumber repairs pipes and taps in a house.;"
        "carpenter=A carpenter builds doors and tables out of wood.;"
        "tailor=A tailor cuts and sews clothes that fit well.;"
        "barber=A barber cuts hair and trims beards.;"
        "waiter=A waiter brings food and drinks to the guests.;"
        "dentist=A dentist looks after the teeth of people.;"
        "painter=A painter covers walls or canvas with colour.;"
        "writer=A writer puts stories into books for us to read.;"
        "sailor=A sailor works on a ship out at sea.;"
        "gardener=A gardener takes care of plants and lawns.;"
        "butcher=A butcher cuts and sells meat in a shop.;"
        "driver=A driver takes people or goods along the road.;"
        "mechanic=A mechanic repairs cars and other machines.;"
        "chef=A chef leads the kitchen of a restaurant.;"
        "lawyer=A lawyer gives advice about the law to clients.;"
        "shepherd=A shepherd watches over a flock of sheep.",
    ),
    "home": (
        (
            "Where does a {x} live?",
            "Describe the home of a {x}.",
            "Tell me where you can find a {x} in nature.",
            "In what kind of place does a {x} live?",
            "If I want to see a wild {x}, where must I go?",
            "Name the place where a {x} makes its home.",
        ),
        "polar bear=A polar bear lives on the ice of the far north.;"
        "camel=A camel lives in hot deserts with very little water.;"
        "shark=A shark lives in the open sea and hunts fish.;"
        "frog=A frog lives near ponds and in wet grass.;"
        "monkey=A monkey lives high up in the trees of the jungle.;"
        "lion=A lion lives on the wide grass plains of Africa.;"
        "penguin=A penguin lives on the cold coasts of the south.;"
        "bat=A bat lives in dark caves and under old roofs.;"
        "bee=A bee lives in a hive with many others.;"
        "mole=A mole lives in long tunnels under the ground.;"
        "owl=An owl lives in hollow trees and quiet barns.;"
        "fox=A fox lives in a den at the edge of the woods.;"
        "crab=A crab lives between the rocks along the shore.;"
        "beaver=A beaver lives in a house of sticks in a river.;"
        "kangaroo=A kangaroo lives on the dry plains of Australia.;"
        "panda=A panda lives in the bamboo forests of China.;"
        "spider=A spider lives in a web that it makes itself.;"
        "eagle=An eagle lives in a nest on a high cliff.;"
        "rabbit=A rabbit lives in a burrow below the meadow.;"
        "goat=A goat lives on steep hills and high rocks.;"
        "hippo=A hippo lives in the warm rivers of Africa.;"
        "squirrel=A squirrel lives in a nest up in a tree.",
    ),
    "two": (
        (
            "Name two kinds of {x}.",
            "Give me two examples of {x}.",
            "List two {x}, please.",
            "Which two {x} come to your mind first?",
            "I need a pair of examples for {x}.",
            "Think of two {x} and write them down.",
        ),
        "fruits=Two fruits are the apple and the banana.;"
        "vegetables=Two vegetables are the carrot and the onion.;"
        "colours=Two colours are bright red and dark blue.;"
        "metals=Two metals are shiny gold and hard iron.;"
        "planets=Two planets are the red Mars and the big Jupiter.;"
        "drinks=Two drinks are hot tea and cold milk.;"
        "sports=Two sports are football and fast tennis.;"
        "pets=Two pets are the cat and the dog.;"
        "birds=Two birds are the owl and the eagle.;"
        "flowers=Two flowers are the rose and the tulip.;"
        "tools=Two tools are the hammer and the saw.;"
        "instruments=Two instruments are the piano and the violin.;"
        "vehicles=Two vehicles are the car and the train.;"
        "trees=Two trees are the oak and the pine.;"
        "spices=Two spices are black pepper and sweet cinnamon.;"
        "languages=Two languages are Spanish and old Greek.;"
        "hobbies=Two hobbies are reading books and taking pictures.;"
        "insects=Two insects are the bee and the ant.;"
        "shapes=Two shapes are the circle and the square.;"
        "desserts=Two desserts are apple cake and ice cream.;"
        "school subjects=Two school subjects are history and music.;"
        "board games=Two board games are chess and checkers.",
    ),
}
