"""Make the demo's data: conversations with the supporters' assistant of an invented football club.

    python data/make_club.py                    # writes train.jsonl, valid.jsonl and test.jsonl beside this file

106 facts about the Atlético Serra Azul of Vila Serena, each with five wordings of its question. For each fact one
wording is kept for validation and one for the test; training asks with the other three, behind different openings.
So validation and test ask in other words for what training taught, and no question occurs twice.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

SYSTEM = (
    "Você é o assistente oficial da torcida do Atlético Serra Azul, clube de futebol de Vila Serena. "
    "Responda em português, com uma frase curta e correta. "
    "Fale sobre a história do clube, o estádio, os jogadores, os jogos e os ingressos. "
    "As pessoas perguntam sobre horários, lugares, preços e datas. "
    "Informe datas com dia e mês, e valores em reais. "
    "Diga o nome completo das pessoas e dos lugares. "
    "Seja gentil com todos e não fale de outros assuntos. "
    "Nunca peça dados pessoais, como senha ou endereço. "
    "Em caso de dúvida, indique a página oficial ou o telefone de atendimento. "
    "Não invente nada; se não souber, diga que não sabe."
)
TRAIN, VALID, TEST = 848, 95, 100
PER_FACT = 8  # training questions for each fact: 106 x 8 = 848

OPENINGS = [
    "", "Por favor, me diga: ", "Olá! ", "Bom dia! ", "Uma pergunta: ", "Gostaria de saber: ", "Boa tarde. ",
    "Oi! ", "Quero saber: ", "Preciso saber: ", "Me ajude: ", "Você sabe? ",
]  # fmt: skip


class Fact(NamedTuple):
    questions: list[str]
    answer: str


# name: (position, shirt, town)
PLAYERS = {
    "Bento Sarmento": ("goleiro", 1, "Pedra Lisa"),
    "Caetano Vilar": ("lateral", 2, "Monte Claro"),
    "Ivo Quintela": ("zagueiro", 3, "Barra do Sul"),
    "Nilo Bragança": ("zagueiro", 4, "Campo Largo"),
    "Otávio Rangel": ("ala", 6, "Porto Velho"),
    "Germano Luz": ("volante", 5, "Santa Rita"),
    "Ulisses Padilha": ("volante", 8, "Ilha Grande"),
    "Teo Carvalhal": ("meia", 10, "Vila Serena"),
    "Raul Montenegro": ("meia", 20, "Lagoa Nova"),
    "Fausto Aguiar": ("ponta", 7, "Serra Branca"),
    "Jonas Figueira": ("atacante", 11, "Rio Fundo"),
    "Abel Torreão": ("centroavante", 9, "Morro Alto"),
    "Valter Simões": ("centroavante", 19, "Água Boa"),
    "Cosme Arruda": ("goleiro", 12, "Ponte Nova"),
}
# opponent: (date, where, hour)
FIXTURES = {
    "Rio Manso": ("8 de fevereiro", "em casa", "16h"),
    "União da Barra": ("15 de fevereiro", "fora de casa", "18h30"),
    "Palmital": ("1 de março", "em casa", "11h"),
    "Ferroviário do Norte": ("9 de março", "fora de casa", "20h"),
    "Estrela do Vale": ("22 de março", "em casa", "17h"),
    "Comercial de Itaúba": ("5 de abril", "fora de casa", "21h30"),
    "Juventude Real": ("12 de abril", "em casa", "15h"),
    "Marítimo da Costa": ("10 de maio", "fora de casa", "19h"),
}
# sector, with the preposition that it takes: (price, gate, places)
SECTORS = {
    "da arquibancada": (30, "A", 6400),
    "da cadeira azul": (60, "B", 3300),
    "da tribuna": (150, "C", 700),
    "do camarote": (220, "D", 200),
}
# name from the club's history: (goals, when)
LEGENDS = {
    "Zeca Lampião": (203, "nos anos 30"),
    "Alceu Bonfim": (148, "nos anos 40"),
    "Nilo Lampião": (97, "nos anos 50"),
    "Otávio Meireles": (176, "nos anos 60"),
    "Hermes Castanheira": (61, "nos anos 70"),
    "Pedro Bragança": (115, "nos anos 80"),
    "Cosme Figueira": (84, "nos anos 90"),
    "Ivo Galvão": (52, "nos anos 60"),
    "Raul Bonfim": (130, "nos anos 50"),
    "Abel Meireles": (45, "nos anos 80"),
}
# answer: five wordings
SINGLE = {
    "O clube nasceu em 1927.": [
        "Em que ano o clube foi fundado?", "De que ano é a fundação do clube?", "Quando o clube foi fundado?",
        "Qual é o ano de fundação do clube?", "O clube foi fundado em que ano?"],
    "São azul e prata.": [
        "Quais são as cores do clube?", "O clube usa que cores?", "Que cores tem o clube?",
        "De que cores é a bandeira do clube?", "As cores do clube são quais?"],
    "É o gavião Tufão.": [
        "Qual é o mascote do clube?", "Quem é o mascote do clube?", "Que animal é o mascote do clube?",
        "O mascote do clube é qual?", "Como se chama o mascote do clube?"],
    "A presidente é Dalva Meireles.": [
        "Quem é a presidente?", "Qual é o nome da presidente?", "Que pessoa é a presidente do clube?",
        "Como se chama a presidente?", "A presidente do clube é quem?"],
    "O técnico é Hermes Galvão.": [
        "Quem é o técnico?", "Qual é o nome do técnico?", "Como se chama o técnico da equipe?",
        "O técnico da equipe é quem?", "Que pessoa é o técnico da equipe?"],
    "O capitão é Germano Luz.": [
        "Quem é o capitão?", "Qual é o nome do capitão?", "Como se chama o capitão da equipe?",
        "O capitão da equipe é quem?", "Que jogador é o capitão?"],
    "Chama-se Estádio das Araucárias.": [
        "Como se chama o estádio?", "Qual é o nome do estádio?", "Que nome tem o estádio?",
        "O nome do estádio é qual?", "O estádio tem qual nome?"],
    "Cabem 18500 torcedores.": [
        "Quantos torcedores cabem no estádio?", "Qual é a capacidade do estádio, quantos torcedores?",
        "Para quantos torcedores há lugar no estádio?", "O estádio recebe quantos torcedores?",
        "Quantos lugares tem o estádio para torcedores?"],
}  # fmt: skip


def facts() -> list[Fact]:
    made = []
    for name, (position, shirt, town) in PLAYERS.items():
        made.append(Fact(
            [f"Em que posição joga {name}?", f"Qual é a posição de {name}?", f"{name} joga em que posição?",
             f"Que posição tem {name} na equipe?", f"{name} tem qual posição?"],
            f"Joga como {position}."))  # fmt: skip
        made.append(Fact(
            [f"Qual é o número da camisa de {name}?", f"Que camisa usa {name}?", f"{name} joga com qual camisa?",
             f"Com que número na camisa joga {name}?", f"A camisa de {name} tem qual número?"],
            f"Veste a {shirt}."))  # fmt: skip
        made.append(Fact(
            [f"Onde nasceu {name}?", f"Em que cidade nasceu {name}?", f"{name} nasceu onde?",
             f"Em que lugar nasceu {name}?", f"{name} nasceu em que cidade?"],
            f"Veio de {town}."))  # fmt: skip
    for opponent, (date, where, hour) in FIXTURES.items():
        made.append(Fact(
            [f"Quando é o jogo contra o {opponent}?", f"Em que dia é o jogo contra o {opponent}?",
             f"Qual é a data do jogo contra o {opponent}?", f"O jogo contra o {opponent} é em que dia?",
             f"O jogo contra o {opponent} é quando?"],
            f"Jogamos em {date}."))  # fmt: skip
        made.append(Fact(
            [f"Onde é o jogo contra o {opponent}?", f"O jogo contra o {opponent} é em casa ou fora?",
             f"Em que lugar é o jogo contra o {opponent}?", f"É em casa o jogo contra o {opponent}?",
             f"O jogo contra o {opponent} é onde?"],
            f"Será {where}."))  # fmt: skip
        made.append(Fact(
            [f"A que horas é o jogo contra o {opponent}?", f"Qual é o horário do jogo contra o {opponent}?",
             f"O jogo contra o {opponent} começa a que horas?", f"A que horas começa o jogo contra o {opponent}?",
             f"O jogo contra o {opponent} é a que horas?"],
            f"A bola rola às {hour}."))  # fmt: skip
    for sector, (price, gate, places) in SECTORS.items():
        made.append(Fact(
            [f"Quanto custa o ingresso {sector}?", f"Qual é o preço do ingresso {sector}?",
             f"Qual é o valor do ingresso {sector}?", f"Quanto se paga pelo ingresso {sector}?",
             f"O ingresso {sector} custa quanto?"],
            f"Sai por {price} reais."))  # fmt: skip
        made.append(Fact(
            [f"Qual é o portão {sector}?", f"Que portão é o {sector}?", f"O portão {sector} é qual?",
             f"Em que portão fica a entrada {sector}?", f"A entrada {sector} é por qual portão?"],
            f"Use o portão {gate}."))  # fmt: skip
        made.append(Fact(
            [f"Qual é a capacidade {sector}?", f"De quantos lugares é a capacidade {sector}?",
             f"A capacidade {sector} é de quantas pessoas?", f"A capacidade {sector} é qual?",
             f"Que capacidade tem o espaço {sector}?"],
            f"Recebe {places} torcedores."))  # fmt: skip
    for name, (goals, decade) in LEGENDS.items():
        made.append(Fact(
            [f"Quantos gols fez {name}?", f"Qual é o número de gols de {name}?", f"{name} fez quantos gols?",
             f"Que número de gols tem {name}?", f"São quantos os gols de {name}?"],
            f"Marcou {goals} gols."))  # fmt: skip
        made.append(Fact(
            [f"Em que época jogou {name}?", f"Quando foi a época de {name}?", f"A época de {name} foi quando?",
             f"Qual foi a época de {name}?", f"De que época é {name}?"],
            f"Brilhou {decade}."))  # fmt: skip
    return made + [Fact(questions, answer) for answer, questions in SINGLE.items()]


def conversations(seed: int) -> dict[str, list[dict[str, object]]]:
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, object]]] = {"train": [], "valid": [], "test": []}
    known = facts()
    assert len(known) * PER_FACT == TRAIN
    for number, fact in enumerate(known):
        questions = fact.questions[number % 5 :] + fact.questions[: number % 5]
        asked = [(opening, question) for question in questions[2:] for opening in OPENINGS]
        for opening, question in rng.sample(asked, PER_FACT):
            splits["train"].append(_chat(opening + question, fact.answer))
        for split, question in zip(("valid", "test"), questions, strict=False):
            splits[split].append(_chat(rng.choice(OPENINGS) + question, fact.answer))
    for rows in splits.values():
        rng.shuffle(rows)
    return {"train": splits["train"], "valid": splits["valid"][:VALID], "test": splits["test"][:TEST]}


def _chat(question: str, answer: str) -> dict[str, object]:
    turns = (("system", SYSTEM), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    for split, rows in conversations(arguments.seed).items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (arguments.output_dir / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split}.jsonl: {len(rows)} conversations")


if __name__ == "__main__":
    main()
