"""More skills with sentence-long answers: advice, food, proverbs, clothes, shopping."""

ADVICE: dict[str, tuple[tuple[str, ...], str]] = {
    "proverb": (
        (
            "Complete the proverb: {x}",
            "How does this saying end: {x}",
            "Finish the old saying that starts with {x}",
            "Write the whole proverb that begins: {x}",
            "Grandma only said the first half, {x}, so what is the rest?",
            "Which proverb opens with the words {x}?",
        ),
        "the early bird=The early bird catches the worm.;"
        "a stitch in time=A stitch in time saves nine.;"
        "an apple a day=An apple a day keeps the doctor away.;"
        "too many cooks=Too many cooks spoil the broth.;"
        "actions speak=Actions speak louder than words.;"
        "all that glitters=All that glitters is not gold.;"
        "better late=Better late than never at all.;"
        "birds of a feather=Birds of a feather flock together.;"
        "practice makes=Practice makes perfect in the end.;"
        "when in Rome=When in Rome do as the Romans do.;"
        "a rolling stone=A rolling stone gathers no moss.;"
        "look before=Look before you leap into it.;"
        "the grass is always greener=The grass is always greener on the other side.;"
        "every cloud=Every cloud has a silver lining.;"
        "honesty is=Honesty is the best policy of all.;"
        "still waters=Still waters run very deep indeed.;"
        "two heads=Two heads are better than one.;"
        "where there is smoke=Where there is smoke there is fire.;"
        "a picture is worth=A picture is worth a thousand words.;"
        "many hands=Many hands make light work of it.",
    ),
    "advice": (
        (
            "How can I {x}?",
            "Give me one piece of advice: I want to {x}.",
            "What should I do to {x}?",
            "Tell me a simple way to {x}.",
            "My goal this month is to {x}, any tip?",
            "I would like to {x}, where do I start?",
        ),
        "sleep better=Go to bed at the same time every night.;"
        "save money=Write down all you spend and cut what you do not need.;"
        "learn a language=Practise a few new words every single day.;"
        "lose weight=Eat less sugar and walk for an hour a day.;"
        "stay calm=Breathe slowly and count to ten before you speak.;"
        "find a job=Send a short and clear letter to many firms.;"
        "make new friends=Join a club and talk to the people there.;"
        "get up early=Put the alarm clock far away from your bed.;"
        "read more=Keep a book next to your bed and turn off the phone.;"
        "get fit=Start with a short run three times a week.;"
        "save water=Take a short shower and close the tap.;"
        "write better=Use short sentences and read them out loud.;"
        "remember names=Repeat the name aloud when you first hear it.;"
        "keep plants alive=Give them light and water them once a week.;"
        "clean my room=Begin with the floor and then do the desk.;"
        "pass my exam=Study a little each day and ask when you are lost.;"
        "be on time=Leave home ten minutes before you have to.;"
        "eat well=Put more vegetables and less salt on your plate.;"
        "stop a cold=Rest at home and drink plenty of warm tea.;"
        "speak in public=Practise your talk in front of a friend.;"
        "train my dog=Reward the dog each time it does the right thing.;"
        "plan a trip=Choose the dates first and then book a room.",
    ),
    "dish": (
        (
            "What do I need to make {x}?",
            "List the ingredients of {x}.",
            "Which ingredients go into {x}?",
            "Tell me what {x} is made of.",
            "I want to cook {x} tonight, what should I buy?",
            "Name the things that belong in {x}.",
        ),
        "pancakes=You need flour, eggs and milk for pancakes.;"
        "bread=You need flour, water, salt and yeast for bread.;"
        "an omelette=You need eggs, butter and salt for an omelette.;"
        "tomato soup=You need tomatoes, onions and cream for tomato soup.;"
        "pizza=You need dough, tomatoes and cheese for pizza.;"
        "a fruit salad=You need apples, bananas and grapes for a fruit salad.;"
        "lemonade=You need lemons, sugar and cold water for lemonade.;"
        "a cheese sandwich=You need bread, butter and cheese for a cheese sandwich.;"
        "rice pudding=You need rice, milk and sugar for rice pudding.;"
        "pasta sauce=You need tomatoes, garlic and oil for pasta sauce.;"
        "apple pie=You need apples, flour, butter and sugar for apple pie.;"
        "fried rice=You need rice, eggs and peas for fried rice.;"
        "hot chocolate=You need milk, cocoa and sugar for hot chocolate.;"
        "mashed potatoes=You need potatoes, butter and milk for mashed potatoes.;"
        "a green salad=You need lettuce, oil and vinegar for a green salad.;"
        "a cake=You need flour, eggs, butter and sugar for a cake.;"
        "a burger=You need beef, a bun and lettuce for a burger.;"
        "pea soup=You need peas, onions and bacon for pea soup.;"
        "garlic bread=You need bread, garlic and butter for garlic bread.;"
        "a milkshake=You need milk, ice cream and fruit for a milkshake.;"
        "guacamole=You need avocado, lime and salt for guacamole.;"
        "porridge=You need oats, milk and honey for porridge.",
    ),
    "wear": (
        (
            "What should I wear {x}?",
            "Tell me what clothes fit {x}.",
            "Which clothes are right {x}?",
            "Help me to choose my clothes {x}.",
            "I stand before my wardrobe, what do I put on {x}?",
            "Suggest an outfit {x}.",
        ),
        "in the snow=Wear a warm coat, gloves and thick boots.;"
        "in the rain=Wear a raincoat and shoes that keep water out.;"
        "at the beach=Wear a swimsuit and a hat against the sun.;"
        "at a wedding=Wear a dark suit or a long dress.;"
        "for a job interview=Wear a clean shirt and a simple jacket.;"
        "at the gym=Wear light shorts and a pair of sports shoes.;"
        "in the mountains=Wear strong boots and several thin layers.;"
        "in bed=Wear soft pyjamas made of cotton.;"
        "at a funeral=Wear plain black clothes without bright colours.;"
        "at a party=Wear something bright in which you can dance.;"
        "on a boat=Wear a life jacket and shoes that do not slip.;"
        "in a hot country=Wear loose and light clothes that cover your skin.;"
        "on a bike=Wear a helmet and a bright yellow vest.;"
        "at the office=Wear a neat shirt with dark trousers.;"
        "in the garden=Wear old trousers and a pair of gloves.;"
        "in the kitchen=Wear an apron and shoes that are closed.;"
        "on a horse=Wear a riding helmet and high boots.;"
        "at the theatre=Wear a nice jacket or an elegant dress.",
    ),
    "shop": (
        (
            "Where can I buy {x}?",
            "Tell me where to get {x}.",
            "Which shop sells {x}?",
            "Name a place where {x} can be bought.",
            "I have run out of {x}, where should I go?",
            "In town, who sells {x}?",
        ),
        "bread=You can buy bread at the bakery.; meat=You can buy meat at the butcher.;"
        "medicine=You can buy medicine at the pharmacy.; books=You can buy books at the bookshop.;"
        "flowers=You can buy flowers at the florist.;"
        "stamps=You can buy stamps at the post office.;"
        "nails=You can buy nails at the hardware store.; fish=You can buy fish at the harbour.;"
        "toys=You can buy toys at the toy shop.; shoes=You can buy shoes at the shoe shop.;"
        "fuel=You can buy fuel at the petrol station.; cake=You can buy cake at the bakery.;"
        "rings=You can buy rings at the jeweller.; glasses=You can buy glasses at the optician.;"
        "tickets=You can buy tickets at the station.;"
        "sofas=You can buy sofas at the furniture store.;"
        "paint=You can buy paint at the hardware store.; roses=You can buy roses at the florist.;"
        "magazines=You can buy magazines at the newsstand.; honey=You can buy honey at the market.;"
        "apples=You can buy apples at the market.; pens=You can buy pens at the stationery shop.;"
        "guitars=You can buy guitars at the music shop.; bandages=You can buy bandages at the"
        " pharmacy.",
    ),
    "sentence": (
        (
            "Write a sentence with the word {x}.",
            "Use the word {x} in a sentence.",
            "Make a short sentence that contains {x}.",
            "Show me how to use {x} in a sentence.",
            "For my homework I need a sentence about {x}.",
            "Build one sentence around the word {x}.",
        ),
        "dog=The dog chased a ball across the yard.; moon=The moon shone over the quiet lake.;"
        "train=The train was late again this morning.; garden=She planted roses in her garden.;"
        "coffee=He drinks his coffee without any sugar.; music=We danced to the music all night.;"
        "bridge=They walked over the old stone bridge.; letter=I found a letter under the door.;"
        "winter=Last winter the river was full of ice.; chair=The cat sleeps on my chair all day.;"
        "window=Please open the window a little wider.; market=We bought fresh fish at the market.;"
        "doctor=The doctor told him to rest for a week.; school=The school is closed on Sunday.;"
        "storm=The storm broke the tree in two.; bread=The smell of fresh bread filled the house.;"
        "river=Two boats went slowly down the river.; clock=The clock on the wall has stopped.;"
        "island=They spent a week on a small island.; teacher=Our teacher told us a funny story.;"
        "kitchen=Dinner is waiting in the kitchen.; forest=We heard an owl deep in the forest.;"
        "umbrella=I left my umbrella on the bus.; mountain=Snow covers the top of the mountain.",
    ),
}
