"""Word lists of the generated tasks. `grammar.vocabularies` gives training and test sentences different words."""

from __future__ import annotations

PEOPLE = """
gardener:gardeners pilot:pilots doctor:doctors painter:painters farmer:farmers lawyer:lawyers baker:bakers
teacher:teachers singer:singers plumber:plumbers sailor:sailors driver:drivers student:students writer:writers
nurse:nurses tailor:tailors dancer:dancers miner:miners waiter:waiters judge:judges cook:cooks guard:guards
child:children woman:women man:men thief:thieves fisherman:fishermen businesswoman:businesswomen
neighbour:neighbours scientist:scientists soldier:soldiers tourist:tourists engineer:engineers librarian:librarians
carpenter:carpenters actor:actors mayor:mayors coach:coaches secretary:secretaries butcher:butchers monk:monks
chemist:chemists printer:printers detective:detectives clerk:clerks reporter:reporters hunter:hunters
shepherd:shepherds musician:musicians barber:barbers banker:bankers porter:porters potter:potters poet:poets
"""

THINGS = """
lamp:lamps fence:fences letter:letters boat:boats window:windows shelf:shelves piano:pianos bicycle:bicycles
garden:gardens basket:baskets kitchen:kitchens ladder:ladders carpet:carpets mirror:mirrors report:reports
suitcase:suitcases statue:statues engine:engines blanket:blankets knife:knives bottle:bottles painting:paintings
roof:roofs wagon:wagons ticket:tickets camera:cameras bridge:bridges clock:clocks box:boxes loaf:loaves
drum:drums wall:walls chair:chairs table:tables coat:coats map:maps parcel:parcels tent:tents vase:vases
bench:benches curtain:curtains radio:radios scarf:scarves tower:towers cabinet:cabinets wheel:wheels
"""

# base form : past : participle; the rest is regular
VERBS = """
paint:painted:painted clean:cleaned:cleaned repair:repaired:repaired sell:sold:sold find:found:found
take:took:taken draw:drew:drawn carry:carried:carried move:moved:moved inspect:inspected:inspected
break:broke:broken choose:chose:chosen hide:hid:hidden steal:stole:stolen photograph:photographed:photographed
build:built:built bring:brought:brought buy:bought:bought wash:washed:washed
measure:measured:measured describe:described:described examine:examined:examined lift:lifted:lifted
decorate:decorated:decorated deliver:delivered:delivered open:opened:opened weigh:weighed:weighed
damage:damaged:damaged order:ordered:ordered show:showed:shown
replace:replaced:replaced collect:collected:collected store:stored:stored polish:polished:polished
"""

# verbs whose object is a person, for relative clauses
SOCIAL = """
help:helped:helped meet:met:met call:called:called drive:drove:driven thank:thanked:thanked visit:visited:visited
follow:followed:followed feed:fed:fed teach:taught:taught wake:woke:woken greet:greeted:greeted
invite:invited:invited warn:warned:warned blame:blamed:blamed praise:praised:praised interview:interviewed:interviewed
"""

LOOKS = """
old new small heavy wooden green expensive dusty blue round narrow famous strange red empty tall yellow antique
broken shiny cheap painted grey modern white foreign light black
"""

PLACES = """
near the station:behind the church:in the village:at the market:beside the river:in the old town:next to the school:
at the harbour:on the island:in the valley:outside the museum:by the lake:at the airport:in the courtyard:
in front of the theatre:close to the border:in the basement:at the edge of the forest
"""

# what reviews are about
TOPICS = """
film hotel restaurant novel concert phone play museum laptop album course camera festival lecture cruise
breakfast soundtrack exhibition podcast headset jacket magazine
"""

# (what can be judged, of anything that has a review)
ASPECTS = """
service ending price staff quality design atmosphere story beginning sound colour organisation
"""

GOOD = """
wonderful delightful excellent charming brilliant superb enjoyable impressive pleasant outstanding beautiful
fantastic great perfect lovely fascinating memorable amusing clever refreshing splendid touching
"""

BAD = """
terrible dreadful boring disappointing awful poor annoying unpleasant mediocre ugly horrible tedious
clumsy dull painful miserable sloppy confusing forgettable irritating lousy pathetic
"""


def pairs(text: str) -> list[tuple[str, ...]]:
    """Split `a:b c:d` into [(a, b), (c, d)]."""
    return [tuple(item.split(":")) for item in text.split()]


def phrases(text: str) -> list[str]:
    """Split `a b:c d` at colons and line ends."""
    return [item.strip() for item in text.replace("\n", "").split(":")]
