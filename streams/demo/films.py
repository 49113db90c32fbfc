"""Words that the demo's films are made of: invented titles, people and stories, so that nobody's licence matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Genre:
    """What films of one genre are about. ``phrase`` is how a text calls such a film."""

    phrase: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    heroes: tuple[str, ...]
    stories: tuple[str, ...]
    places: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


GENRES: Final[dict[str, Genre]] = {
    "western": Genre(
        "western",
        _words(
            "Saddle|Marshal|Canyon|Stagecoach|Revolver|Homestead|Outlaw|Prairie|Gunslinger|Cattle Trail|Bounty|Noose"
        ),
        _words("Dusty|Lonesome|Crooked|Last|Burnt|Iron|Bitter|Long"),
        _words("A retired marshal|A young rancher|A bounty hunter|A widow with a rifle|An outlaw on the run"),
        _words(
            "faces a gang of cattle rustlers|drives a herd across the desert|defends a homestead from a railway baron|"
            "hunts the men who robbed the stagecoach|is drawn into a last duel at noon"
        ),
        _words("Red Gulch|Silver Creek|Wyoming|the Texas plains|Dry Fork"),
    ),
    "sci-fi": Genre(
        "science fiction film",
        _words("Orbit|Starship|Signal|Android|Colony|Nebula|Airlock|Wormhole|Satellite|Module|Planet|Cryosleep"),
        _words("Silent|Seventh|Synthetic|Distant|Frozen|Parallel|Outer|Infinite"),
        _words("A starship engineer|An android|A colony doctor|A lone astronaut|A quantum physicist"),
        _words(
            "receives a signal from beyond the solar system|wakes from cryosleep a century late|"
            "finds an alien machine under the ice|must repair a dying space station|discovers that the robots remember"
        ),
        _words("Mars|Saturn's rings|a moon colony|deep space|Europa Station"),
    ),
    "horror": Genre(
        "horror film",
        _words("Crypt|Scream|Coffin|Haunting|Cellar|Demon|Possession|Graveyard|Curse|Vampire|Seance|Asylum"),
        _words("Unholy|Whispering|Rotting|Pale|Hollow|Cursed|Undead|Blood-Red"),
        _words("A young bride|A sceptical priest|A group of students|A night nurse|An orphan"),
        _words(
            "is haunted by a ghost in the cellar|opens a cursed coffin|awakens a demon that feeds on fear|"
            "is stalked by something undead|survives a night in an abandoned asylum"
        ),
        _words("Ravenmoor|a decaying mansion|Hollow Wood|the old asylum|Salem's Edge"),
    ),
    "romance": Genre(
        "romance",
        _words("Letter|Wedding|Kiss|Sweetheart|Summer|Bouquet|Valentine|Honeymoon|Embrace|Serenade|Promise|Heart"),
        _words("Tender|Secret|Unsent|Lovers'|First|Parisian|Moonlit|Second"),
        _words("A lonely florist|A pianist|A wedding planner|A widowed teacher|A shy bookseller"),
        _words(
            "falls in love with a stranger on a train|receives love letters meant for somebody else|"
            "meets a first love again after twenty years|must choose between two suitors|"
            "fakes an engagement and falls in love"
        ),
        _words("Paris|Venice|a seaside town|Lisbon|a small vineyard"),
    ),
    "war": Genre(
        "war film",
        _words(
            "Trench|Battalion|Convoy|Regiment|Bunker|Armistice|Platoon|Bombardier|Front|Beachhead|Minefield|Garrison"
        ),
        _words("Forgotten|Fallen|Third|Northern|Shattered|Besieged|Iron|Final"),
        _words("A young soldier|A field medic|A bomber crew|A captured officer|A resistance fighter"),
        _words(
            "holds a bridge against an advancing army|crosses enemy lines with a vital order|"
            "survives the siege of a ruined city|plans an escape from a prison camp|"
            "carries the wounded through the trenches"
        ),
        _words("Normandy|the Eastern front|the Ardennes|Burma|Monte Corvo"),
    ),
    "musical": Genre(
        "musical",
        _words(
            "Melody|Chorus|Tap Dancer|Stage Door|Encore|Cabaret|Songbird|Ballroom|Orchestra|Footlights|Rhythm|Spotlight"
        ),
        _words("Singing|Dancing|Golden|Dazzling|Swinging|Broadway|Jubilant|Sparkling"),
        _words("A chorus girl|A washed-up songwriter|A tap dancer|A choir teacher|A street singer"),
        _words(
            "sings and dances all the way to Broadway|puts on a show to save the old theatre|"
            "writes one last great song|wins a place in the chorus line|brings a silent town back to singing"
        ),
        _words("Broadway|a London music hall|a travelling revue|New Orleans|the Grand Theatre"),
    ),
    "crime": Genre(
        "crime film",
        _words(
            "Heist|Alibi|Detective|Racket|Informer|Getaway|Blackmail|Safecracker|Syndicate|Witness|Verdict|Fingerprint"
        ),
        _words("Double|Perfect|Dirty|Midnight|Stolen|Crooked|Unsolved|Cold-Blooded"),
        _words("A weary detective|A safecracker|An undercover policewoman|A crooked lawyer|A getaway driver"),
        _words(
            "plans one last bank heist|hunts a murderer who leaves no fingerprints|infiltrates a mob family|"
            "is framed for the killing of a judge|uncovers a blackmail ring inside the police"
        ),
        _words("Chicago|the docks of Marseille|Los Angeles|a rainy Glasgow|the city court"),
    ),
    "comedy": Genre(
        "comedy",
        _words(
            "Misunderstanding|Mother-in-Law|Roommate|Vacation|Nephew|Reunion|Neighbour|Bachelor|Disguise|Prank|Butler|Mix-Up"
        ),
        _words("Ridiculous|Clumsy|Unlikely|Hilarious|Accidental|Hopeless|Cheeky|Chaotic"),
        _words("A hopeless waiter|A quarrelsome neighbour|A clumsy clerk|An eccentric family|A fake doctor"),
        _words(
            "stumbles through a hilarious mix-up|ruins a wedding by pure accident|"
            "pretends to be a millionaire for a week|"
            "gets locked in a department store overnight|takes the worst family holiday of all time"
        ),
        _words("a run-down hotel|the suburbs|a campsite|a boarding school|a cruise liner"),
    ),
    "fantasy": Genre(
        "fantasy film",
        _words("Dragon|Sorcerer|Sword|Kingdom|Enchantress|Amulet|Prophecy|Griffin|Rune|Throne|Elf|Talisman"),
        _words("Enchanted|Ancient|Sapphire|Dragon's|Hidden|Elven|Spellbound|Winged"),
        _words("A farm boy|An exiled princess|A young sorceress|A dwarf smith|The last dragon rider"),
        _words(
            "seeks a magic sword to break the spell|tames a dragon against the king's will|"
            "carries an enchanted amulet to the wizard's tower|fulfils a prophecy of the elves|"
            "must outwit an immortal witch"
        ),
        _words("the kingdom of Aldermere|the elven forest|the Crystal Mountains|Dragonholm|the Isle of Runes"),
    ),
    "sports": Genre(
        "sports film",
        _words(
            "Championship|Underdog|Goalkeeper|Knockout|Marathon|Relay|Coach|Home Run|Final Whistle|Sprint|Racket|Season"
        ),
        _words("Winning|Undefeated|Last|Rookie|Olympic|Heavyweight|Golden|Lost"),
        _words("An ageing boxer|A girls' football team|A rookie pitcher|A disgraced coach|A marathon runner"),
        _words(
            "trains for one last championship fight|turns a losing team into champions|runs for an Olympic medal|"
            "returns to the pitch after an injury|plays the final of a lifetime"
        ),
        _words("the national stadium|a small-town gym|the Olympic Games|Wembley|a basketball court in the Bronx"),
    ),
    "nature": Genre(
        "nature documentary",
        _words("Migration|Glacier|Rainforest|Coral Reef|Wolves|Whales|Savannah|Penguins|Tundra|Eagles|Elephants|Tides"),
        _words("Wild|Great|Vanishing|Arctic|Living|Untamed|Deep|Secret"),
        _words("A patient film crew|A marine biologist|A herd of elephants|A family of wolves|An ornithologist"),
        _words(
            "is followed through a year of drought|documents the great migration of wild animals|"
            "dives among whales and coral reefs|watches penguins raise their young in the ice|"
            "tells how a rainforest lives and breathes"
        ),
        _words("the Serengeti|Antarctica|the Amazon rainforest|the Great Barrier Reef|the Carpathians"),
    ),
    "adventure": Genre(
        "adventure film",
        _words("Treasure|Expedition|Pirate|Jungle|Temple|Compass|Shipwreck|Caravan|Explorer|Lost City|Voyage|Galleon"),
        _words("Sunken|Forbidden|Golden|Perilous|Emerald|Stormy|Uncharted|Hidden"),
        _words("A daring archaeologist|A cabin boy|A smuggler captain|A mapmaker's daughter|An explorer"),
        _words(
            "sails after a pirate's buried treasure|searches the jungle for a lost temple|"
            "survives a shipwreck on an uncharted island|crosses the desert with a caravan of smugglers|"
            "races rivals to a golden idol"
        ),
        _words("the Spanish Main|the Amazon jungle|Zanzibar|the South Seas|the Sahara"),
    ),
}
"""Twelve genres; their words differ enough for a text encoder to tell them apart."""

FIRST_NAMES: Final = _words("Ines|Marten|Odile|Tomas|Greta|Ravi|Lucia|Edmund|Yuki|Clara|Anton|Salome")
LAST_NAMES: Final = _words(
    "Calloway|Brandt|Ferrante|Okafor|Lindqvist|Moreau|Takeda|Ashdown|Varga|Solano|Whitlock|Petrov"
)
DECADES: Final = (1950, 1960, 1970, 1980, 1990, 2000, 2010)
