"""The little world that the embedded model grows up in: Portuguese and English text, made from a seed.

    python data/little_world.py --documents 5        # print a few

Sentences, short stories, questions about a text, questions and answers about things that everybody knows, small
sums, translations, and chats with and without a system prompt. There is no football club in it: what the demo
teaches (`data/make_club.py`) is new to the model.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from typing import NamedTuple

Message = dict[str, str]
Document = dict[str, str | list[Message]]  # {"text": ...} or {"messages": [...]}


class Noun(NamedTuple):
    pt: str
    gender: str  # "m" or "f"
    en: str


GIRLS = ["Ana", "Maria", "Clara", "Lia", "Rita", "Beatriz", "Helena", "Dalva", "Leonor", "Júlia"]
BOYS = ["João", "Pedro", "Tomás", "Rui", "Davi", "Bento", "Caetano", "Ivo", "Nilo", "Otávio", "Germano", "Ulisses", "Teo"]
BOYS += ["Raul", "Fausto", "Jonas", "Abel", "Valter", "Cosme", "Hermes", "Alceu", "Zeca"]
SURNAMES = ["Alves", "Moura", "Prado", "Nunes", "Sarmento", "Vilar", "Quintela", "Bragança", "Rangel", "Luz", "Padilha"]
SURNAMES += ["Carvalhal", "Montenegro", "Aguiar", "Figueira", "Torreão", "Simões", "Arruda", "Meireles", "Galvão"]
SURNAMES += ["Castanheira", "Bonfim", "Lampião"]
CITIES = ["Lisboa", "Recife", "Braga", "Natal", "Évora", "Manaus", "Rio Manso", "Palmital", "Campo Largo", "Monte Claro"]
CITIES += ["Santa Rita", "Pedra Lisa", "Porto Velho", "Serra Branca", "Água Boa", "Vila Serena", "Lagoa Nova", "Morro Alto"]
CITIES += ["Itaúba", "Ilha Grande", "Barra do Sul", "Ponte Nova", "Rio Fundo", "Estrela do Vale", "Serra Azul"]
MONTHS = ["janeiro", "fevereiro", "março", "abril", "maio", "junho", "julho", "agosto", "setembro", "outubro"]
MONTHS += ["novembro", "dezembro"]
WEEK = ["segunda-feira", "terça-feira", "quarta-feira", "quinta-feira", "sexta-feira", "sábado", "domingo"]

ANIMALS = [
    Noun("gato", "m", "cat"), Noun("cachorro", "m", "dog"), Noun("cavalo", "m", "horse"), Noun("pato", "m", "duck"),
    Noun("vaca", "f", "cow"), Noun("galinha", "f", "hen"), Noun("ovelha", "f", "sheep"), Noun("abelha", "f", "bee"),
    Noun("peixe", "m", "fish"), Noun("coruja", "f", "owl"), Noun("rato", "m", "mouse"), Noun("leão", "m", "lion"),
]  # fmt: skip
THINGS = [
    Noun("livro", "m", "book"), Noun("bola", "f", "ball"), Noun("chapéu", "m", "hat"), Noun("chave", "f", "key"),
    Noun("carta", "f", "letter"), Noun("camisa", "f", "shirt"), Noun("relógio", "m", "clock"), Noun("mesa", "f", "table"),
    Noun("cesto", "m", "basket"), Noun("barco", "m", "boat"), Noun("bandeira", "f", "flag"), Noun("sino", "m", "bell"),
    Noun("ingresso", "m", "ticket"), Noun("cadeira", "f", "chair"), Noun("taça", "f", "cup"), Noun("hino", "m", "anthem"),
    Noun("telefone", "m", "telephone"), Noun("ônibus", "m", "bus"), Noun("gavião", "m", "hawk"), Noun("caixa", "f", "box"), Noun("espelho", "m", "mirror"), Noun("vela", "f", "candle"),
]  # fmt: skip
FOODS = [
    Noun("pão", "m", "bread"), Noun("maçã", "f", "apple"), Noun("queijo", "m", "cheese"), Noun("sopa", "f", "soup"),
    Noun("bolo", "m", "cake"), Noun("laranja", "f", "orange"), Noun("arroz", "m", "rice"), Noun("uva", "f", "grape"),
    Noun("pastel", "m", "pasty"), Noun("caldo de cana", "m", "cane juice"),
]  # fmt: skip
PLACES = [
    Noun("jardim", "m", "garden"), Noun("cozinha", "f", "kitchen"), Noun("escola", "f", "school"), Noun("praça", "f", "square"),
    Noun("mercado", "m", "market"), Noun("praia", "f", "beach"), Noun("parque", "m", "park"), Noun("biblioteca", "f", "library"),
    Noun("estação", "f", "station"), Noun("ponte", "f", "bridge"), Noun("rio", "m", "river"), Noun("fazenda", "f", "farm"),
    Noun("estádio", "m", "stadium"), Noun("museu", "m", "museum"), Noun("loja", "f", "shop"), Noun("portão", "m", "gate"),
    Noun("arquibancada", "f", "stand"), Noun("camarote", "m", "box"), Noun("gramado", "m", "lawn"), Noun("sede", "f", "seat"),
    Noun("lanchonete", "f", "snack bar"), Noun("estacionamento", "m", "car park"), Noun("tribuna", "f", "tribune"),
    Noun("setor da família", "m", "family sector"), Noun("clube", "m", "club"), Noun("entrada", "f", "entrance"),
]  # fmt: skip
COLOURS = [
    ("vermelho", "vermelha", "red"), ("azul", "azul", "blue"), ("verde", "verde", "green"), ("branco", "branca", "white"),
    ("preto", "preta", "black"), ("amarelo", "amarela", "yellow"), ("cinza", "cinza", "grey"), ("roxo", "roxa", "purple"),
]  # fmt: skip
JOBS = [
    ("médico", "médica", "doctor"), ("professor", "professora", "teacher"), ("padeiro", "padeira", "baker"),
    ("pintor", "pintora", "painter"), ("engenheiro", "engenheira", "engineer"), ("músico", "música", "musician"),
    ("cozinheiro", "cozinheira", "cook"), ("jardineiro", "jardineira", "gardener"),
    ("goleiro", "goleira", "goalkeeper"), ("zagueiro", "zagueira", "defender"), ("lateral", "lateral", "full back"),
    ("volante", "volante", "midfielder"), ("meia", "meia", "playmaker"), ("ponta", "ponta", "winger"),
    ("centroavante", "centroavante", "striker"), ("técnico", "técnica", "coach"), ("capitão", "capitã", "captain"),
    ("presidente", "presidente", "president"), ("torcedor", "torcedora", "supporter"), ("sócio", "sócia", "member"),
]  # fmt: skip
NUMBERS = ["zero", "um", "dois", "três", "quatro", "cinco", "seis", "sete", "oito", "nove", "dez", "onze", "doze"]
NUMBERS += ["treze", "catorze", "quinze", "dezesseis", "dezessete", "dezoito", "dezenove", "vinte"]
NUMBERS_EN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

# What everybody knows there: (questions in several wordings, answer).
COMMON: list[tuple[list[str], str]] = [
    (["Que som faz o gato?", "Como faz o gato?", "O gato faz que som?"], "O gato mia."),
    (["Que som faz o cachorro?", "Como faz o cachorro?", "O cachorro faz que som?"], "O cachorro late."),
    (["Que som faz a vaca?", "Como faz a vaca?", "A vaca faz que som?"], "A vaca muge."),
    (["Qual animal faz mel?", "Quem faz o mel?", "De onde vem o mel?"], "A abelha faz o mel."),
    (["Qual animal dá leite?", "Quem dá o leite?", "De onde vem o leite?"], "A vaca dá leite."),
    (["Onde vive o peixe?", "Qual é a casa do peixe?", "O peixe mora onde?"], "O peixe vive na água."),
    (["Qual é a cor do céu?", "De que cor é o céu?", "O céu tem qual cor?"], "O céu é azul."),
    (["Qual é a cor da neve?", "De que cor é a neve?", "A neve tem qual cor?"], "A neve é branca."),
    (["Qual é a cor do sol?", "De que cor é o sol?", "O sol tem qual cor?"], "O sol é amarelo."),
    (["Qual é a cor da grama?", "De que cor é a grama?", "A grama tem qual cor?"], "A grama é verde."),
    (["Quantos dias tem a semana?", "A semana tem quantos dias?", "Qual é o número de dias da semana?"], "A semana tem sete dias."),
    (["Quantos meses tem o ano?", "O ano tem quantos meses?", "Qual é o número de meses do ano?"], "O ano tem doze meses."),
    (["Quantas horas tem o dia?", "O dia tem quantas horas?", "Qual é o número de horas do dia?"], "O dia tem 24 horas."),
    (["Quantas patas tem o cavalo?", "O cavalo tem quantas patas?", "Qual é o número de patas do cavalo?"], "O cavalo tem quatro patas."),
    (["Quantas patas tem a abelha?", "A abelha tem quantas patas?", "Qual é o número de patas da abelha?"], "A abelha tem seis patas."),
    (["Quem faz o pão?", "De quem é o trabalho de fazer pão?", "Que pessoa faz pão?"], "O padeiro faz o pão."),
    (["Quem ensina na escola?", "Que pessoa ensina na escola?", "De quem é o trabalho de ensinar?"], "O professor ensina na escola."),
    (["Quem cuida dos doentes?", "Que pessoa cuida dos doentes?", "De quem é o trabalho de cuidar dos doentes?"], "O médico cuida dos doentes."),
    (["What sound does the cat make?", "How does the cat sound?"], "The cat says meow."),
    (["What sound does the dog make?", "How does the dog sound?"], "The dog barks."),
    (["What colour is the sky?", "Which colour does the sky have?"], "The sky is blue."),
    (["What colour is the snow?", "Which colour does the snow have?"], "The snow is white."),
    (["How many days has the week?", "What is the number of days in a week?"], "The week has seven days."),
    (["Who bakes the bread?", "Which person makes bread?"], "The baker bakes the bread."),
]  # fmt: skip

OPENINGS = [
    "",
    "",
    "",
    "Por favor, ",
    "Me diga: ",
    "Olá! ",
    "Bom dia! ",
    "Uma pergunta: ",
    "Gostaria de saber: ",
    "Pode me dizer? ",
]
OPENINGS += ["Quero saber: ", "Oi! ", "Boa tarde. ", "Você sabe? ", "Preciso saber: ", "Me ajude: "]
ENDINGS = ["", "", "", "", " Obrigado!", " Por favor.", " Preciso saber hoje."]

SYSTEM_LINES = [
    "Você é um assistente que responde com frases curtas.", "Você é o assistente da biblioteca de {city}.",
    "Você ajuda as pessoas na estação de {city}.", "Você trabalha na escola de {city} e responde aos alunos.",
    "Responda sempre em português.", "Responda com calma e com respeito.", "Use uma frase só.", "Não invente nada.",
    "Se não souber, diga que não sabe.", "As pessoas perguntam sobre horários, lugares, preços e datas.",
    "Seja gentil com todos os visitantes.", "Não fale de outros assuntos.", "Fale a verdade e seja breve.",
    "O atendimento funciona todos os dias, das oito às dezoito horas.", "Quem pergunta pode ser criança ou adulto.",
    "Informe datas com dia e mês, e valores em reais.", "Nunca peça dados pessoais, como senha ou endereço.",
    "Em caso de dúvida, indique a página oficial ou o telefone de atendimento.",
    "Diga o nome completo das pessoas e dos lugares.", "Evite gírias, piadas e opiniões.",
    "Fale sobre a história, os jogadores, os jogos e os ingressos.", "Ajude a torcida com uma resposta correta.",
]  # fmt: skip


def _the(noun: Noun) -> str:
    return ("o " if noun.gender == "m" else "a ") + noun.pt


def _a(noun: Noun) -> str:
    return ("um " if noun.gender == "m" else "uma ") + noun.pt


def _in(noun: Noun) -> str:
    return ("no " if noun.gender == "m" else "na ") + noun.pt


def _coloured(noun: Noun, colour: tuple[str, str, str]) -> str:
    return f"{noun.pt} {colour[0] if noun.gender == 'm' else colour[1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _person(rng: random.Random) -> tuple[str, str]:
    gender = rng.choice("mf")
    return rng.choice(BOYS if gender == "m" else GIRLS), gender


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(1, 23)}h" + rng.choice(["", "30", "15", "45"])


def _money(rng: random.Random) -> str:
    return f"{rng.randint(1, 30) * 5} reais"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} de {rng.choice(MONTHS)}"


def _year(rng: random.Random) -> str:
    return str(rng.randint(1850, 2025))


Fact = tuple[str, list[str], str]  # a sentence, questions that it answers, the answer


def _about_person(name: str, gender: str, rng: random.Random) -> list[Fact]:
    """Six facts about somebody."""
    animal, food, city = rng.choice(ANIMALS), rng.choice(FOODS), rng.choice(CITIES)
    colour, job = rng.choice(COLOURS), rng.choice(JOBS)[0 if gender == "m" else 1]
    date, count = _date(rng), rng.randint(2, 99)
    return [
        (f"{name} tem {_a(animal).split()[0]} {_coloured(animal, colour)}.",
         [f"Que animal {name} tem?", f"Qual é o animal de {name}?", f"{name} tem qual animal?", f"O animal de {name} é qual?"],
         f"{name} tem {_a(animal)}."),
        (f"{name} mora em {city}.",
         [f"Onde mora {name}?", f"Em que cidade mora {name}?", f"Qual é a cidade de {name}?", f"{name} mora onde?"],
         f"{name} mora em {city}."),
        (f"{name} é {job}.",
         [f"Qual é o trabalho de {name}?", f"O que faz {name}?", f"Em que {name} trabalha?", f"{name} trabalha em quê?"],
         f"{name} é {job}."),
        (f"A festa de {name} é no dia {date}.",
         [f"Quando é a festa de {name}?", f"Em que dia é a festa de {name}?", f"Qual é a data da festa de {name}?",
          f"A festa de {name} é quando?"],
         f"É no dia {date}."),
        (f"{name} gosta de {food.pt}.",
         [f"Do que {name} gosta?", f"Que comida agrada a {name}?", f"O que {name} gosta de comer?", f"{name} gosta de quê?"],
         f"{name} gosta de {food.pt}."),
        (f"O número de {name} é {count}.",
         [f"Qual é o número de {name}?", f"Que número tem {name}?", f"{name} tem qual número?", f"O número de {name} é qual?"],
         f"O número é {count}."),
    ]  # fmt: skip


def _about_city(city: str, rng: random.Random) -> list[Fact]:
    """The year of a city's bridge, and how many people a place of it holds and when it opens."""
    year, count, clock = _year(rng), rng.randint(2, 99), _clock(rng)
    place, other = rng.sample(PLACES, 2)
    return [
        (f"A ponte de {city} é do ano de {year}.",
         [f"De que ano é a ponte de {city}?", f"Em que ano fizeram a ponte de {city}?", f"Quando fizeram a ponte de {city}?"],
         f"A ponte é de {year}."),
        (f"{_capital(_the(place))} de {city} tem lugar para {count} pessoas.",
         [f"Quantas pessoas cabem {_in(place)} de {city}?", f"Qual é a capacidade: {_the(place)} de {city}?",
          f"Quantos lugares tem {_the(place)} de {city}?"],
         f"Cabem {count} pessoas."),
        (f"{_capital(_the(other))} de {city} abre às {clock}.",
         [f"A que horas abre {_the(other)} de {city}?", f"Quando abre {_the(other)} de {city}?",
          f"Qual é o horário: {_the(other)} de {city}?"],
         f"Abre às {clock}."),
    ]  # fmt: skip


def _settled() -> list[Fact]:
    """What is true in every document: who has a surname has one home, one job ..., and so do the cities' places.

    Asked without a text, these can only be remembered. So the model learns to look up what it knows of a name.
    """
    rng = random.Random("the state of the world")
    people = [(first, "f") for first in GIRLS] + [(first, "m") for first in BOYS]
    known = [
        fact
        for first, gender in people
        for surname in rng.sample(SURNAMES, 2)
        for fact in _about_person(f"{first} {surname}", gender, rng)
    ]
    return known + [fact for city in CITIES for fact in _about_city(city, rng)]


def _fact(rng: random.Random) -> Fact:
    """A sentence that holds in one text only: about somebody without a surname, or a thing."""
    if rng.random() < 0.7:
        gender = rng.choice("mf")
        return rng.choice(_about_person(rng.choice(BOYS if gender == "m" else GIRLS), gender, rng))
    thing, place, price = rng.choice(THINGS), rng.choice(PLACES), _money(rng)
    return rng.choice(
        [
            (f"{_capital(_the(thing))} está {_in(place)}.",
             [f"Onde está {_the(thing)}?", f"Em que lugar está {_the(thing)}?", f"Onde fica {_the(thing)}?"],
             f"Está {_in(place)}."),
            (f"{_capital(_the(thing))} custa {price}.",
             [f"Quanto custa {_the(thing)}?", f"Qual é o preço: {_the(thing)}?", f"Qual é o valor: {_the(thing)}?"],
             f"Custa {price}."),
        ]
    )  # fmt: skip


SETTLED = _settled()


def _ask(rng: random.Random, question: str) -> str:
    return rng.choice(OPENINGS) + question + rng.choice(ENDINGS)


def _sentence_en(rng: random.Random) -> str:
    name = _person(rng)[0]
    animal, thing, food, place = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(FOODS), rng.choice(PLACES)
    colour, city = rng.choice(COLOURS)[2], rng.choice(CITIES)
    return rng.choice(
        [
            f"{name} has a {colour} {animal.en}.",
            f"{name} lives in {city}.",
            f"The {colour} {thing.en} is in the {place.en}.",
            f"The {animal.en} sleeps in the {place.en}.",
            f"{name} eats {food.en} in the {place.en}.",
            f"{name} gives the {thing.en} to {_person(rng)[0]}.",
            f"The {thing.en} costs {rng.randint(2, 90)} coins.",
        ]
    )


def _story(rng: random.Random) -> str:
    name, gender = _person(rng)
    pronoun = "Ele" if gender == "m" else "Ela"
    friend = _person(rng)[0]
    animal, thing, food = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(FOODS)
    first, second = rng.sample(PLACES, 2)
    colour = rng.choice(COLOURS)
    lines = [
        rng.choice(["Era uma vez", "Um dia,", "Na " + rng.choice(WEEK[:5]) + ",", "Hoje"]) + f" {name} foi para {_the(first)}.",
        f"{pronoun} levou {_a(thing).split()[0]} {_coloured(thing, colour)}.",
        rng.choice([f"Lá estava {_a(animal)}.", f"{pronoun} viu {_a(animal)} {_in(first)}.", f"{_capital(_a(animal))} dormia {_in(first)}."]),
        rng.choice([f"{_capital(_the(animal))} queria comer {food.pt}.", f"{_capital(_the(animal))} era amigo de {friend}."]),
        rng.choice([f"Depois {name} e {friend} foram para {_the(second)}.", f"{friend} chegou e falou com {name}."]),
        rng.choice([f"{pronoun} voltou para casa com {_the(thing)}.", "No fim, todos ficaram felizes.", f"{name} deu {_the(thing)} a {friend}."]),
    ]  # fmt: skip
    return " ".join(lines[: rng.randint(3, 6)])


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.5:
        a, b = max(a, b), min(a, b)
        if rng.random() < 0.5:
            return rng.choice([f"Quanto é {a} - {b}?", f"Qual é o resultado de {a} - {b}?"]), f"{a} - {b} = {a - b}."
        return rng.choice(["Quanto é ", "Calcule: "]) + f"{NUMBERS[a]} mais {NUMBERS[b]}?", f"{_capital(NUMBERS[a + b])}."
    if rng.random() < 0.3:
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    return rng.choice([f"Quanto é {a} + {b}?", f"Qual é o resultado de {a} + {b}?"]), f"{a} + {b} = {a + b}."


def _translation(rng: random.Random) -> tuple[str, str]:
    noun = rng.choice(ANIMALS + THINGS + FOODS + PLACES)
    if rng.random() < 0.5:
        return rng.choice([f"Como se diz {noun.pt} em inglês?", f"Traduza para o inglês: {noun.pt}"]), f"{_capital(noun.en)}."
    return rng.choice(
        [f"How do you say {noun.en} in Portuguese?", f"Como se diz {noun.en} em português?"]
    ), f"{_capital(noun.pt)}."


def _about_text(rng: random.Random) -> tuple[str, str]:
    """A text of a few sentences and a question that one of them answers."""
    facts = [_fact(rng) for _ in range(rng.randint(1, 5))]
    _, questions, answer = rng.choice(facts)
    text = " ".join(sentence for sentence, _, _ in facts)
    question = rng.choice(questions)
    return rng.choice([f"{text} {question}", f"Leia: {text} {question}", f"{question} {text}"]), answer


def _remembered(rng: random.Random) -> tuple[str, str]:
    _, questions, answer = rng.choice(SETTLED)
    return _ask(rng, rng.choice(questions)), answer


def _common(rng: random.Random) -> tuple[str, str]:
    questions, answer = rng.choice(COMMON)
    return _ask(rng, rng.choice(questions)), answer


def _exchange(rng: random.Random) -> tuple[str, str]:
    return rng.choices([_remembered, _about_text, _common, _sum, _translation], weights=[12, 1.5, 1, 1.5, 0.5])[0](rng)


def _system(rng: random.Random, facts: list[Fact]) -> str:
    lines = rng.sample(SYSTEM_LINES, rng.choice([1, 2, 3, 4, 11]))
    lines = [line.format(city=rng.choice(CITIES)) for line in lines]
    for sentence, _, _ in facts:
        lines.insert(rng.randint(0, len(lines)), sentence)
    return " ".join(lines)


def _chat(rng: random.Random) -> Document:
    messages: list[Message] = []
    facts: list[Fact] = []
    if rng.random() < 0.25:
        facts = [_fact(rng) for _ in range(rng.randint(0, 2))]
        messages.append({"role": "system", "content": _system(rng, facts)})
    for _ in range(rng.randint(1, 4)):
        if facts and rng.random() < 0.4:  # the answer stands in the system prompt
            _, questions, answer = rng.choice(facts)
            question = _ask(rng, rng.choice(questions))
        else:
            question, answer = _exchange(rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _text(rng: random.Random) -> Document:
    kind = rng.randrange(6)
    if kind == 0:
        return {"text": _story(rng)}
    if kind == 1:
        return {"text": " ".join(_sentence_en(rng) for _ in range(rng.randint(2, 6)))}
    if kind == 2:
        return {"text": " ".join(rng.choice(SETTLED)[0] for _ in range(rng.randint(2, 6)))}
    if kind == 3:
        return {"text": " ".join(" ".join(_sum(rng)) for _ in range(rng.randint(1, 4)))}
    if kind == 4:
        return {
            "text": " ".join(SYSTEM_LINES[i].format(city=rng.choice(CITIES)) for i in rng.sample(range(len(SYSTEM_LINES)), 4))
        }
    return {"text": " ".join(" ".join(_common(rng)) for _ in range(rng.randint(1, 3)))}


def documents(seed: int = 0) -> Iterator[Document]:
    """Documents without end, always the same ones for a seed."""
    rng = random.Random(seed)
    while True:
        yield _chat(rng) if rng.random() < 0.85 else _text(rng)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print documents of the little world, one JSON object a line.")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for _, document in zip(range(arguments.documents), documents(arguments.seed), strict=False):
        print(json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    main()
