"""Questions that stand alone, and follow-ups, in several scripts.

The second half of each list was written before the rule, and was not used to choose its words.
"""

# ruff: noqa: RUF001  The questions of other scripts.

from __future__ import annotations

import pytest

from core_rerank_integrations.integrations.rag.follow_ups import stands_alone
from core_rerank_integrations.integrations.rag.prompts import follow_up_search

ALONE = """\
Is there wifi?
Where can I park?
When does the museum open?
Who founded the museum?
Wifi password?
Opening hours?
Are dogs allowed?
What is the refund policy?
How do I cancel a booking?
Do you sell postcards?
Is smoking allowed indoors?
Where are the toilets?
Who keeps the keys?
What time is breakfast?
Can I bring a pram?
Gibt es WLAN?
Wann öffnet das Museum?
Sind Hunde erlaubt?
Wo kann man parken?
Y a-t-il du wifi ?
Où se garer ?
Les chiens sont-ils admis ?
¿Hay wifi?
¿Dónde puedo aparcar?
C'è il wifi?
Есть ли вай-фай?
Где можно припарковаться?
有无线网络吗？
博物馆几点开门？
可以带狗吗？
Wi-Fiはありますか？
駐車場はどこですか？
와이파이가 있나요?
주차는 어디에 하나요?
هل يوجد واي فاي؟
क्या वाई-फाई है?
Do you have lockers?
Is the café open on Mondays?
What ear protection is needed?
Where does the ferry leave?
Lost property?
How do I get a key?
Is there a lift?
Who repairs the lamp?
Are guide dogs welcome?
Can I pay by card?
What causes fog?
Does the hostel have towels?
Group discounts?
Is photography permitted?
Was kostet ein Fahrrad?
Wo ist der Bahnhof?
Gibt es einen Aufzug?
Darf man fotografieren?
Y a-t-il un ascenseur ?
Qui répare la lampe ?
¿Se admiten perros?
¿Dónde está el baño?
Dov'è il bagno?
Onde fica a estação?
Is er een lift?
Где находится вокзал?
Можно ли фотографировать?
洗手间在哪里？
谁创办了博物馆？
犬を連れて行けますか？
トイレはどこですか？
화장실은 어디인가요?
أين الحمام؟
शौचालय कहाँ है?
Чи є ліфт?
Und wo ist das WLAN?
And where can I buy a ticket?
Wifi?
What do the zeppelins of this town need?
Wie viele Hunde leben in dieser Stadt?
Combien de salles dans ce musée ?
""".splitlines()
FOLLOW_UPS = """\
And in winter?
What about children?
How much does it cost?
Why?
How long?
When do they close?
Is that included?
And on Sundays?
For how long?
Where is it?
Who wrote them?
Can he be reached by phone?
Are they allowed on deck?
In winter?
For children?
What else?
How much?
And the return trip?
Does it run at night?
Which ones?
Und im Winter?
Wie viel kostet das?
Warum?
Und für Kinder?
Wo ist es?
Et en hiver ?
Combien ça coûte ?
Pourquoi ?
¿Y en invierno?
¿Cuánto cuesta?
¿Por qué?
E in inverno?
А зимой?
Сколько это стоит?
Почему?
那冬天呢？
它多少钱？
为什么？
冬は？
それはいくらですか？
なぜですか？
그럼 겨울에는요?
얼마예요?
وماذا عن الشتاء؟
और सर्दियों में?
And for groups?
What about the last one?
How much is it for students?
Why not?
Until when?
Who owns them?
Is this free?
Does she live there?
How often?
But what if I'm late?
And then?
Since when?
On holidays?
With a dog?
Can you book it online?
Is their food good?
How does that work?
What happens then?
Und am Sonntag?
Wie lange?
Wann schließt es?
Ist das erlaubt?
Et pour les enfants ?
Combien de temps ?
Est-ce qu'elle est gratuite ?
¿Y los domingos?
¿Cuándo?
¿Está incluido eso?
Quanto costa?
E para crianças?
En op zondag?
А для детей?
Когда он закрывается?
那儿童呢？
这个可以退吗？
子供は？
いつまでですか？
そこに駐車できますか？
왜요?
그건 언제 끝나요?
متى؟
क्यों?
वह कितने का है?
Tell me more
What is the price for this?
""".splitlines()


@pytest.mark.parametrize("question", ALONE)
def test_question_that_stands_alone(question: str) -> None:
    assert stands_alone(question)
    assert follow_up_search(question, ["Are dogs allowed?"]) == question


@pytest.mark.parametrize("question", FOLLOW_UPS)
def test_follow_up(question: str) -> None:
    assert not stands_alone(question)


@pytest.mark.parametrize("question", ["", "?", "And", "。", "🦕", "\u0e44\u0e27\u0e44\u0e1f"])
def test_odd_questions_raise_nothing(question: str) -> None:
    stands_alone(question)


def test_follow_ups_are_joined_to_the_last_question_that_stands_alone() -> None:
    earlier = ["Are dogs allowed?", "When does the ferry go in summer?", "And in winter?"]
    assert follow_up_search("And on Sundays?", earlier) == (
        "When does the ferry go in summer? And on Sundays?"
    )
    assert follow_up_search("And on Sundays?", ["And in winter?"]) == (
        "And in winter? And on Sundays?"
    )
