"""Sentences for the synthetic corpus: commands, numbers, dates and plain statements [ours].

Upper case A-Z, apostrophe and space; 3 to 9 words; about 290 distinct words.
"""

import re
from collections.abc import Collection

import numpy as np

from edgespeech.errors import InputError

MIN_WORDS, MAX_WORDS = 3, 9

_WORDS = {
    "digit": "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE",
    "hour": "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE",
    "teen": "TEN ELEVEN TWELVE THIRTEEN FOURTEEN FIFTEEN SIXTEEN SEVENTEEN EIGHTEEN NINETEEN",
    "tens": "TWENTY THIRTY FORTY FIFTY SIXTY SEVENTY EIGHTY NINETY",
    "minute": "FIFTEEN TWENTY THIRTY FORTY",
    "scale": "HUNDRED THOUSAND",
    "ordinal": "FIRST SECOND THIRD FOURTH FIFTH SIXTH SEVENTH EIGHTH NINTH TENTH",
    "month": "JANUARY FEBRUARY MARCH APRIL MAY JUNE JULY AUGUST SEPTEMBER OCTOBER NOVEMBER "
    "DECEMBER",
    "day": "MONDAY TUESDAY WEDNESDAY THURSDAY FRIDAY SATURDAY SUNDAY",
    "part": "MORNING EVENING AFTERNOON",
    "when": "TODAY TOMORROW TONIGHT NOW LATER SOON",
    "room": "KITCHEN BEDROOM GARAGE HALLWAY OFFICE GARDEN",
    "switch": "LIGHT LAMP HEATER RADIO TELEVISION CAMERA ALARM",
    "state": "ON OFF UP DOWN",
    "shut": "OPEN CLOSE LOCK",
    "opening": "DOOR WINDOW CURTAIN GATE",
    "name": "ANNA BENJAMIN CLARA DANIEL FRANK HENRY ISABEL MARTHA OLIVER PETER SAMUEL VICTOR",
    "relative": "MOTHER FATHER SISTER BROTHER NEIGHBOUR TEACHER DOCTOR",
    "owner": "MY YOUR HIS HER OUR THEIR",
    "pronoun": "HE SHE THEY WE",
    "colour": "RED GREEN BLUE YELLOW BLACK WHITE",
    "animal": "DOG HORSE RABBIT CHICKEN EAGLE TURTLE",
    "thing": "BOOK CHAIR TABLE BASKET HAMMER LETTER CANDLE PICTURE",
    "quality": "SMALL LARGE HEAVY BROKEN QUIET STRANGE BEAUTIFUL",
    "food": "BREAD CHEESE SUGAR COFFEE POTATOES APPLES CHOCOLATE HONEY",
    "unit": "POUNDS BOTTLES KILOS",
    "place": "STATION MARKET SCHOOL LIBRARY HOSPITAL BRIDGE MUSEUM VILLAGE",
    "towards": "TO FROM NEAR BEHIND",
    "moved": "WALKED TRAVELLED HURRIED RETURNED",
    "did": "FOUND BOUGHT CARRIED PAINTED REMEMBERED",
    "animal_did": "SLEEPS JUMPS WAITS",
    "where": "UNDER OVER BESIDE BEHIND NEAR",
    "weather": "RAIN SNOW THUNDER SUNSHINE",
    "look": "COLD SUNNY CLOUDY WINDY",
    "mood": "HAPPY TIRED HUNGRY READY BUSY",
    "transport": "TRAIN BUS FERRY TAXI",
    "play": "MUSIC SONGS STORIES",
    "change": "RAISE LOWER CHECK",
    "level": "VOLUME TEMPERATURE BRIGHTNESS",
    "want": "WANT NEED LIKE",
    "urge": "PLEASE JUST ALWAYS NEVER",
    "span": "MINUTES HOURS DAYS WEEKS",
    "contraction": "I'M HE'S SHE'S WE'RE THEY'RE",
}
SLOTS = {name: tuple(words.split()) for name, words in _WORDS.items()}

TEMPLATES = (
    "TURN {state} THE {room} {switch}",
    "{urge} TURN THE {room} {switch} {state}",
    "TURN {state} THE {switch} AND THE {switch}",
    "{shut} THE {room} {opening}",
    "{urge} {shut} THE {opening} {when}",
    "{change} THE {level} IN THE {room}",
    "SET THE {level} TO {tens} {digit}",
    "PLAY SOME {play} IN THE {room}",
    "{urge} PLAY {owner} {play} {when}",
    "CALL {owner} {relative}",
    "PLEASE PUT THE {colour} {thing} {where} THE {quality} {thing}",
    "CALL {name} AT {hour} {minute}",
    "CALL {owner} {relative} {name} {when}",
    "SEND A MESSAGE TO {name}",
    "TELL {name} THAT {contraction} {mood}",
    "{contraction} {mood} THIS {part}",
    "WAKE ME AT {hour} O'CLOCK IN THE {part}",
    "IT'S HALF PAST {hour} IN THE {part}",
    "IT'S A QUARTER TO {hour} IN THE {part}",
    "SET AN ALARM FOR {hour} {minute} {when}",
    "REMIND ME IN {tens} {span}",
    "WAIT FOR {teen} {span}",
    "MEET {name} ON {day} {part}",
    "THE {transport} LEAVES AT {hour} {minute}",
    "THE {ordinal} {transport} LEAVES ON {day}",
    "{day} THE {ordinal} OF {month}",
    "{name} WAS BORN ON {month} {ordinal}",
    "IN {month} WE SAW {weather} AND {weather}",
    "THERE WILL BE {weather} ON {day}",
    "IT WAS {look} AND {look} IN {month}",
    "THE {part} WAS {look} AND {quality}",
    "{digit} {digit} {digit} {digit}",
    "{digit} {digit} {digit} {digit} {digit} {digit}",
    "DIAL {digit} {digit} {digit} {digit} {digit}",
    "{tens} {digit} PLUS {teen}",
    "{digit} {scale} AND {tens} {digit}",
    "THE NUMBER IS {digit} {scale} AND {teen}",
    "{pronoun} COUNTED {tens} {digit} {unit}",
    "BUY {tens} {unit} OF {food}",
    "ADD {food} AND {food} TO THE LIST",
    "I DON'T {want} ANY {food}",
    "DO YOU {want} {food} OR {food}",
    "{name} {did} {teen} {unit} OF {food}",
    "THE {colour} {animal} {animal_did} {where} THE {thing}",
    "A {quality} {animal} {animal_did} {where} THE {place}",
    "{owner} {animal} {did} A {quality} {thing}",
    "{name} {did} THE {colour} {thing}",
    "{pronoun} {did} {owner} {quality} {thing}",
    "PUT THE {colour} {thing} {where} THE {thing}",
    "WHERE IS {owner} {colour} {thing}",
    "THE {thing} ISN'T {quality}",
    "{pronoun} {moved} {towards} THE {place}",
    "{name} {moved} {towards} THE {quality} {place}",
    "{owner} {relative} {moved} {towards} THE {place}",
    "LET'S GO TO THE {place} {when}",
    "WE CAN'T SEE THE {quality} {place} FROM HERE",
    "TAKE THE {transport} TO THE {place}",
    "{owner} {relative} WE'LL VISIT ON {day}",
)


def vocabulary() -> tuple[str, ...]:
    """Every word that a sentence can hold, sorted."""
    words = {word for slot in SLOTS.values() for word in slot}
    words |= {word for template in TEMPLATES for word in re.sub(r"\{\w+\}", "", template).split()}
    return tuple(sorted(words))


def sentences(
    count: int, seed: tuple[int, ...], exclude: Collection[str] = (), repeat: bool = False
) -> list[str]:
    """Sentences, none of them excluded; the same arguments give the same sentences.

    Templates take turns and so do the words of a slot, each time in a new order: no word is left
    rare by chance.

    Args:
        count: how many.
        seed: of the order.
        exclude: sentences not to make.
        repeat: a sentence may come again. Without it all are distinct, and a template with few sentences soon has
            none left: its words stay rare however many sentences are made.

    Raises:
        InputError: more sentences than the grammar gives.
    """
    # random() alone, because integers() and choice() may change between versions of numpy
    random = np.random.Generator(np.random.PCG64(list(seed)))
    seen, made, misses = set(exclude), [], 0

    def shuffled(items: tuple[str, ...]) -> list[str]:
        return [items[i] for i in np.argsort(random.random(len(items)), kind="stable")]

    decks: dict[str, list[str]] = {}

    def fill(match: re.Match) -> str:
        slot = match.group(1)
        if not decks.get(slot):
            decks[slot] = shuffled(SLOTS[slot])
        return decks[slot].pop()

    while len(made) < count:
        for template in shuffled(TEMPLATES)[: count - len(made)]:
            sentence = re.sub(r"\{(\w+)\}", fill, template)
            if sentence in seen:
                misses += 1
                continue
            if not repeat:
                seen.add(sentence)
            made.append(sentence)
        if misses > 10 * (count + len(TEMPLATES)):
            raise InputError(
                f"the grammar ran out after {len(made)} of {count} distinct sentences; "
                "the fix: ask for fewer synthetic utterances"
            )
    return made
