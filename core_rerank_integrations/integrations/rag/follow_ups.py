"""Whether a question stands by itself, judged by its words: no model reads it."""

# ruff: noqa: RUF001  The words of other scripts.

from __future__ import annotations

import re
from typing import NamedTuple

SELF_CONTAINED_WORDS = 10
"""Questions of at least this many words seldom need the question before them."""
FRAGMENT_WORDS = 4
"""Questions of at most this many words that begin with a preposition are fragments."""

_SEPARATORS = re.compile(r"[\s¿?¡!.,;:…\"“”«»()'’？！。，、؟،।]+")


class _Language(NamedTuple):
    """Words of a language, divided by what they say about a question.

    Attributes:
        refers: Words that stand for something named before.
        joins: Words that join a question to the one before.
        asks: Words that a complete question can begin with.
        prepositions: Words that a fragment begins with.
        others: Words without a subject of their own.
        expletives: Phrases in which a word of ``refers`` stands for nothing.
        topics: Phrases that put another subject into the question before.
    """

    refers: frozenset[str]
    joins: frozenset[str]
    asks: frozenset[str]
    prepositions: frozenset[str]
    others: frozenset[str]
    expletives: re.Pattern[str]
    topics: re.Pattern[str]

    @property
    def all_words(self) -> frozenset[str]:
        return self.refers | self.joins | self.asks | self.prepositions | self.others


def _language(
    refers: str,
    joins: str,
    asks: str,
    prepositions: str,
    others: str,
    expletives: str = "(?!)",
    topics: str = "(?!)",
) -> _Language:
    return _Language(
        _split(refers),
        _split(joins),
        _split(asks),
        _split(prepositions),
        _split(others),
        _phrases(expletives),
        _phrases(topics),
    )


def _split(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _phrases(alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"\W*\b(?:{alternatives})", re.IGNORECASE)


_ENGLISH = _language(
    "it its they them their theirs he she him his her hers this that these those there one ones "
    "same else then instead both neither another",
    "and but or so also plus then",
    "what when where which who whom whose why how is are was were do does did can could may must "
    "should will would has have am",
    "in on at for from to with without by until since during before after under over about",
    "a an the much many more long often far come not any really exactly please tell me s re",
    r"(?:is|are|was|were|isn|aren) there|there (?:is|are|was|were)|what time is it|one day"
    r"|(?:of|in|at|on|for|from|to) th(?:is|ese) \w+",
    "what about|how about|what if|what of",
)
_GERMAN = _language(
    "er sie es ihn ihm ihnen ihr ihre ihren sein seine das dies diese dieser dort dorthin dafür "
    "davon damit dazu daran darin dabei dann",
    "und aber oder also sonst",
    "was wann wo wohin woher wer wen wem wessen warum wieso weshalb wie welche welcher welches ist "
    "sind war hat haben kann können darf dürfen muss müssen gibt wird werden",
    "in im am an auf für von vom zu zum zur mit ohne bei bis seit nach vor während ab um",
    "der die den dem des ein eine einen viel viele lange oft weit nicht noch genau wirklich",
    r"gibt es|es gibt|(?:in|an|auf|von|für|zu|mit) diese[mnrs]? \w+"
    r"|das (?-i:(?=[A-ZÄÖÜ]))",  # An article before a noun.
    "was ist mit|wie ist es mit|wie sieht es mit",
)
_FRENCH = _language(
    "il elle ils elles lui leur leurs ça cela ceci celui celle ceux celles ce y en là son sa ses",
    "et mais ou alors sinon",
    "que qu quoi quand où qui pourquoi comment combien quel quelle quels quelles est sont peut "
    "puis faut a ont",
    "dans sur pour de du des à au aux avec sans par jusqu jusque depuis pendant avant après chez "
    "en",
    "le la les un une d l c s temps coûte pas vraiment ça autre",
    r"(?:à|dans|de|pour|sur) ce \w+|(?:est-)?ce qu[e']?|qu['’ ]?est[- ]ce"
    r"|il y a|y a-t-il|\w+-(?:il|elle|ils|elles|t-il|t-elle)",
    "qu['’]en est-il|et pour|et si",
)
_SPANISH = _language(
    "él ella ellos ellas lo le les esto eso este ese esta esa estos esos ahí allí su sus",
    "y e pero o entonces",
    "qué cuándo dónde quién quiénes cuál cuáles cómo cuánto cuánta cuántos cuántas cuesta hay es "
    "son está están puedo puede se",
    "en para por de del a al con sin hasta desde durante antes después",
    "el la los las un una no tiempo incluido",
    expletives=r"(?:de|en|para) est[aeo]s? \w+",
    topics="qué hay de|qué pasa con|qué tal",
)
_ITALIAN = _language(
    "esso essa essi lui lei loro lo li questo questa quello quella lì là suo sua",
    "e ed ma o allora",
    "che cosa quando dove dov chi quale quali perché come quanto quanta quanti quante c è ci sono "
    "si può",
    "in nel nella per di del della a al alla con senza fino da dal durante",
    "il lo la gli un una uno costa tempo non",
    r"(?:di|in|per) quest[aeio] \w+",
)
_PORTUGUESE = _language(
    "ele ela eles elas isto isso este esse esta essa ali lá seu sua",
    "e mas ou então",
    "que quando onde quem qual quais como quanto quanta quantos porquê porque há é são está fica "
    "posso pode",
    "em no na nos nas para por de do da com sem até desde durante",
    "o os as um uma custa tempo não",
)
_DUTCH = _language(
    "het hij zij ze hem hen haar hun dit dat deze die daar dan ervan erbij",
    "en maar of dus",
    "wat wanneer waar wie waarom hoe welke welk is zijn was heeft kan mag moet kost",
    "in op aan voor van naar met zonder bij tot sinds tijdens",
    "de een veel lang vaak er niet",
    r"(?:in|op|van|voor) (?:deze|dit) \w+|is er|zijn er|er (?:is|zijn)"
    r"|is het \w+ (?:open|dicht|gesloten)",
)
_CYRILLIC = _language(  # Russian and Ukrainian
    "он она оно они его ее её их ему ей им это этот эта эти тот та те там туда тогда такой "
    "він вона воно вони його її їх це цей ця ці там туди",
    "и а но или тогда і й та але або",
    "что когда где куда откуда кто почему зачем как какой какая какие сколько есть ли можно нужно "
    "що коли де хто чому як який скільки чи є можна",
    "в во на для от до с со без по из у при после с під з із від після про",
    "стоит длится же не долго часто коштує ще еще ещё",
    topics="как насч[её]т|а как же|що з приводу",
)
_HINDI = _language(
    "यह वह ये वे उस इस उन इन उसे इसे उन्हें उसका उसकी उसके इसका इसकी इसके उनका वहाँ वहां यहाँ",
    "और लेकिन या तो फिर",
    "क्या कब कहाँ कहां कौन क्यों कैसे कितना कितने कितनी",
    "",
    "का की के में पर से को है हैं था थी",
)
_ARABIC = _language(
    "هو هي هم هما هذا هذه ذلك تلك",
    "و أو لكن وماذا ماذا",
    "ما متى أين من لماذا كيف كم هل أي وهل ومتى وأين وكم وكيف ولماذا",
    "في على إلى عن مع بدون حتى منذ وفي وعن ومع وعلى",
    "يوجد توجد هناك",
)
_LATIN = (_ENGLISH, _GERMAN, _FRENCH, _SPANISH, _ITALIAN, _PORTUGUESE, _DUTCH)
_WITH_SPACES = (
    (re.compile(r"[\u0400-\u04ff]"), (_CYRILLIC,)),
    (re.compile(r"[\u0900-\u097f]"), (_HINDI,)),
    (re.compile(r"[\u0600-\u06ff]"), (_ARABIC,)),
    (re.compile(""), _LATIN),
)
# What refers, joins or is a fragment, and what is left of a question without a subject.
_KOREAN = re.compile(
    r"^(?:그럼|그러면|그리고|그런데|그건|그게|그것|그곳|거기|그때|이건|이것|걔)|(?:은|는)요?\?*$"
    r"|^(?:왜|언제|언제까지|어디|어디서|어디에|누가|얼마|얼마나|몇 시|어떻게)"
    r"(?:예요|에요|이에요|요|인가요|까지예요|까지인가요)?\?*$"
)
_JAPANESE = re.compile(
    r"それ|そこ|その|そちら|あれ|あの|あそこ|これ|この|彼|^(?:では|じゃあ|でも|また|そして)"
    r"|(?:は|なら)[？?]*$"
    r"|^(?:いつ|なぜ|どうして|どこ|誰|いくら|何時|どのくらい|どう)(?:から|まで)?(?:です|でしょう)?か?[？?]*$"
)
_CHINESE = re.compile(
    r"[它他她]|^那|^(?:还有|但是|可是|而且)|[这那](?=个|里|些|样|是|儿|位|种|可|要|多|什)|呢[？?]*$"
    r"|^(?:为什么|什么时候|何时|多少钱?|多久|多长时间|几点|在?哪里|在?哪儿|谁|怎么[去走用办]?|是吗|真的吗)[？?]*$"
)
_WITHOUT_SPACES = (
    (re.compile(r"[\uac00-\ud7af]"), _KOREAN),
    (re.compile(r"[\u3040-\u30ff]"), _JAPANESE),
    (re.compile(r"[\u4e00-\u9fff]"), _CHINESE),
)


def stands_alone(question: str) -> bool:
    """Return whether a question can be understood without the one before.

    A question depends on the one before if it refers back ("How much does *it* cost?"), is joined
    to it ("*And* on Sundays?"), is a fragment ("In winter?") or has no subject ("Why?"). Words of
    English, German, French, Spanish, Italian, Portuguese, Dutch, Russian, Ukrainian, Hindi,
    Arabic, Chinese, Japanese and Korean are known. Questions in other languages stand alone.

    Args:
        question: The question.
    """
    text = question.strip()
    for script, depends in _WITHOUT_SPACES:
        if script.search(text):
            return not depends.search(text)
    languages = next(languages for script, languages in _WITH_SPACES if script.search(text))
    words = _words(text)
    language = max(
        languages, key=lambda language: sum(word in language.all_words for word in words)
    )
    return _stands_alone(text, language)


def _stands_alone(text: str, language: _Language) -> bool:
    words = _words(text)
    if len(words) >= SELF_CONTAINED_WORDS:
        return True
    if all(word in language.all_words for word in words) or language.topics.match(text):
        return False
    if words[0] in language.joins:
        rest = text[text.casefold().index(words[0]) + len(words[0]) :]
        return words[1] in language.asks and _stands_alone(rest, language)
    if words[0] in language.prepositions and len(words) <= FRAGMENT_WORDS:
        return False
    return not language.refers.intersection(_words(language.expletives.sub(" ", text)))


def _words(text: str) -> list[str]:
    return [word for word in _SEPARATORS.split(text.casefold()) if word]
