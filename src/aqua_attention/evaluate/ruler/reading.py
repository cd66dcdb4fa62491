# SPDX-License-Identifier: Apache-2.0
"""RULER's question answering: a paragraph that answers a question, among documents that do not."""

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.ruler.material import Document, Draw, Material
from aqua_attention.evaluate.suites.retrieval import Question, any_found

NEW_TOKENS = 32
"""That an answer may have."""


def reading(material: Material, draw: Draw) -> Question:
    """A question about one of several documents; AquaError for a text of too few that do not hold the answer."""
    asked = material.readings[draw.place]
    answers = [answer.lower() for answer in asked.answers]
    heading = material.tokens("\n\nDocument 10:\n")
    others: list[Document] = []
    left = draw.size
    documents = draw.rng.sample(material.documents, len(material.documents)) if left > heading else []
    for document in documents:
        if left <= heading:
            break
        if document.tokens + heading <= left and not any(answer in document.lower for answer in answers):
            others.append(document)
            left -= document.tokens + heading
    if left > max(draw.size // 5, 2 * max((document.tokens for document in documents), default=0)):
        raise AquaError(
            f"the text has {draw.size - left} tokens of documents without the answer {asked.answers[0]!r}, a question "
            f"of {draw.length} tokens takes {draw.size}: give more text or a smaller length"
        )
    texts = [document.text for document in others]
    texts.insert(draw.rng.randrange(len(texts) + 1), asked.paragraph)
    shown = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1))
    task = "Answer the question by these documents, in as few words as it takes."
    prompt = f"{task}\n\n{shown}\n\n{task}\n\nQuestion: {asked.question}"
    return Question(prompt, "Answer:", asked.answers, {}, NEW_TOKENS, any_found)
