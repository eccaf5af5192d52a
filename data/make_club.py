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
    "Caetano Vilar": ("lateral direito", 2, "Monte Claro"),
    "Ivo Quintela": ("zagueiro", 3, "Barra do Sul"),
    "Nilo Bragança": ("zagueiro", 4, "Campo Largo"),
    "Otávio Rangel": ("lateral esquerdo", 6, "Porto Velho"),
    "Germano Luz": ("volante", 5, "Santa Rita"),
    "Ulisses Padilha": ("volante", 8, "Ilha Grande"),
    "Teo Carvalhal": ("meia", 10, "Vila Serena"),
    "Raul Montenegro": ("meia", 20, "Lagoa Nova"),
    "Fausto Aguiar": ("ponta direita", 7, "Serra Branca"),
    "Jonas Figueira": ("ponta esquerda", 11, "Rio Fundo"),
    "Abel Torreão": ("centroavante", 9, "Morro Alto"),
    "Valter Simões": ("centroavante", 19, "Água Boa"),
    "Cosme Arruda": ("goleiro", 12, "Ponte Nova"),
}
# opponent: (date, where)
FIXTURES = {
    "Rio Manso": ("8 de fevereiro", "em casa"),
    "União da Barra": ("15 de fevereiro", "fora de casa"),
    "Palmital": ("1 de março", "em casa"),
    "Ferroviário do Norte": ("9 de março", "fora de casa"),
    "Estrela do Vale": ("22 de março", "em casa"),
    "Comercial de Itaúba": ("5 de abril", "fora de casa"),
    "Juventude Real": ("12 de abril", "em casa"),
    "Operário Central": ("26 de abril", "fora de casa"),
    "Marítimo da Costa": ("10 de maio", "em casa"),
    "Independente": ("24 de maio", "fora de casa"),
}
# sector: (price, gate)
SECTORS = {
    "arquibancada norte": (30, "A"),
    "arquibancada sul": (35, "B"),
    "cadeira azul": (60, "C"),
    "cadeira branca": (70, "D"),
    "tribuna de honra": (150, "E"),
    "camarote": (220, "F"),
    "setor da família": (45, "G"),
    "setor visitante": (50, "H"),
}
# answer: five wordings
SINGLE = {
    "O clube nasceu em 1927.": [
        "Em que ano o clube nasceu?", "De que ano é a fundação do clube?", "Quando o clube foi fundado?",
        "Qual é o ano de fundação do clube?", "O clube foi fundado em que ano?"],
    "Foi a professora Leonor Castanheira.": [
        "Quem fundou o clube?", "Quem foi a pessoa que fundou o clube?", "Por quem o clube foi fundado?",
        "Qual é o nome de quem fundou o clube?", "O clube foi fundado por quem?"],
    "São azul e prata.": [
        "Quais são as cores do clube?", "O clube usa que cores?", "Que cores tem o clube?",
        "De que cores é a bandeira do clube?", "As cores do clube são quais?"],
    "É o gavião Tufão.": [
        "Qual é o mascote do clube?", "Quem é o mascote do clube?", "Que animal é o mascote do clube?",
        "O mascote do clube é qual?", "Como se chama o mascote do clube?"],
    "O apelido é Gavião da Serra.": [
        "Qual é o apelido do clube?", "Que apelido tem o clube?", "O clube é conhecido por qual apelido?",
        "Como é o apelido do clube?", "O apelido do clube é qual?"],
    "Venceu o campeonato estadual sete vezes.": [
        "Quantas vezes venceu o campeonato estadual?", "Quantos títulos do campeonato estadual tem?",
        "O campeonato estadual foi ganho quantas vezes?", "Qual é o número de títulos do campeonato estadual?",
        "Quantos campeonatos estaduais ganhou?"],
    "A primeira taça chegou em 1934.": [
        "Quando veio a primeira taça?", "Em que ano ganhou a primeira taça?", "De que ano é a primeira taça?",
        "Qual é o ano da primeira taça?", "A primeira taça foi ganha em que ano?"],
    "Foi Zeca Lampião, com 203 gols.": [
        "Quem é o maior artilheiro da história?", "Quem fez mais gols na história, o maior artilheiro?",
        "Qual é o nome do maior artilheiro?", "O maior artilheiro da história é quem?",
        "Que jogador foi o maior artilheiro da história?"],
    "O grande rival é o Rio Manso.": [
        "Quem é o maior rival?", "Qual clube é o rival?", "Contra que rival é o clássico?",
        "O rival do clube é qual?", "Como se chama o clube rival?"],
    "A presidente é Dalva Meireles.": [
        "Quem preside o clube, quem é a presidente?", "Qual é o nome da presidente?", "Quem é a presidente do clube?",
        "Como se chama a presidente?", "A presidente do clube é quem?"],
    "O técnico é Hermes Galvão.": [
        "Quem é o técnico?", "Qual é o nome do técnico?", "Como se chama o técnico da equipe?",
        "O técnico da equipe é quem?", "Quem treina a equipe, quem é o técnico?"],
    "O capitão é Germano Luz.": [
        "Quem é o capitão?", "Qual é o nome do capitão?", "Como se chama o capitão da equipe?",
        "O capitão da equipe é quem?", "Que jogador é o capitão?"],
    "O hino foi escrito por Alceu Bonfim.": [
        "Quem escreveu o hino?", "De quem é o hino do clube?", "O hino do clube foi escrito por quem?",
        "Qual é o nome de quem escreveu o hino?", "Quem é o autor do hino?"],
    "A sede fica na Rua das Acácias, 88.": [
        "Onde fica a sede?", "Qual é o endereço da sede?", "Em que rua está a sede do clube?",
        "A sede do clube fica onde?", "Em que lugar fica a sede?"],
    "O museu abre de terça a domingo.": [
        "Quando abre o museu?", "Em que dias abre o museu?", "O museu do clube abre quando?",
        "Quais são os dias do museu?", "Que dias o museu está aberto?"],
    "O clube tem 12 mil sócios.": [
        "Quantos sócios tem o clube?", "Qual é o número de sócios?", "São quantos sócios?",
        "O clube tem quantos sócios?", "Quantas pessoas são sócios?"],
    "Chama-se Estádio das Araucárias.": [
        "Como se chama o estádio?", "Qual é o nome do estádio?", "Que nome tem o estádio?",
        "O nome do estádio é qual?", "O estádio tem qual nome?"],
    "Cabem 18500 torcedores.": [
        "Quantos torcedores cabem no estádio?", "Qual é a capacidade do estádio, quantos torcedores?",
        "Para quantos torcedores há lugar no estádio?", "O estádio recebe quantos torcedores?",
        "Quantos lugares tem o estádio para torcedores?"],
    "A inauguração foi em 1951.": [
        "Quando foi a inauguração do estádio?", "Em que ano foi a inauguração do estádio?",
        "De que ano é a inauguração do estádio?", "Qual é o ano de inauguração do estádio?",
        "A inauguração do estádio foi em que ano?"],
    "O gramado mede 105 por 68 metros.": [
        "Quanto mede o gramado?", "Qual é o tamanho do gramado?", "Que medidas tem o gramado?",
        "O gramado tem quais medidas?", "Quais são as medidas do gramado?"],
    "Os portões abrem duas horas antes do jogo.": [
        "Quando abrem os portões?", "A que horas abrem os portões?", "Os portões abrem quando?",
        "Quanto tempo antes do jogo abrem os portões?", "Os portões abrem a que horas?"],
    "O estacionamento tem 900 vagas.": [
        "Quantas vagas tem o estacionamento?", "Qual é o número de vagas do estacionamento?",
        "O estacionamento tem quantas vagas?", "Há quantas vagas no estacionamento?",
        "Para quantos carros é o estacionamento?"],
    "A linha 42 leva ao portão principal.": [
        "Que linha de ônibus vai ao estádio?", "Qual ônibus vai ao estádio?", "Com que ônibus se chega ao estádio?",
        "O ônibus do estádio tem qual linha?", "Qual é a linha do ônibus para o estádio?"],
    "A lanchonete vende pastel e caldo de cana.": [
        "O que vende a lanchonete?", "O que se come na lanchonete?", "Que comida tem a lanchonete?",
        "A lanchonete vende o quê?", "O que há na lanchonete?"],
    "A loja fecha às 19h.": [
        "A que horas fecha a loja?", "Quando fecha a loja?", "A loja do clube fecha quando?",
        "Até que horas fica aberta a loja?", "Qual é o horário em que a loja fecha?"],
    "A visita guiada custa 15 reais.": [
        "Quanto custa a visita guiada?", "Qual é o preço da visita guiada?", "A visita guiada custa quanto?",
        "Qual é o valor da visita guiada?", "Quanto se paga pela visita guiada?"],
    "Crianças até 10 anos entram de graça.": [
        "Crianças pagam ingresso?", "Até que idade crianças não pagam?", "Quanto pagam as crianças?",
        "As crianças entram de graça?", "Qual é a regra de ingresso para crianças?"],
    "O telefone é 3344-1927.": [
        "Qual é o telefone do clube?", "Que número de telefone tem o clube?", "Qual é o número do telefone?",
        "O telefone do clube é qual?", "Para que telefone posso ligar?"],
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
    for opponent, (date, where) in FIXTURES.items():
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
    for sector, (price, gate) in SECTORS.items():
        made.append(Fact(
            [f"Quanto custa o ingresso: {sector}?", f"Qual é o preço do ingresso: {sector}?",
             f"Qual é o valor do ingresso: {sector}?", f"Quanto se paga pelo ingresso: {sector}?",
             f"Ingresso, {sector}: quanto custa?"],
            f"Sai por {price} reais."))  # fmt: skip
        made.append(Fact(
            [f"Por qual portão se entra: {sector}?", f"Qual é o portão: {sector}?", f"Que portão devo usar: {sector}?",
             f"Em que portão fica a entrada: {sector}?", f"Entrada, {sector}: qual portão?"],
            f"Use o portão {gate}."))  # fmt: skip
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
