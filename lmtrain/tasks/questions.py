"""Questions with short answers from a JSON Lines file: generated, and compared as text."""

from __future__ import annotations

import string

from lmtrain.tasks import listed
from lmtrain.tasks.generated import Message, Row, assistant, number
from lmtrain.types import LmtrainError


class Questions(listed.Given):
    """A row has `question` and `answer`, a text or several that will do. All rows are held out, in the file's order.

    A reply is right where it equals an answer once both are normalised: lower case, without the ASCII signs of
    punctuation, blanks at the ends off and runs of blanks one blank. (What lm-evaluation-harness's exact_match does
    with ignore_case and ignore_punctuation, but for the blanks; SQuAD's, arXiv 1606.05250, but for articles, which
    stay.)

    Args:
      path: the file.
      train_path: another file, to train on.
      prompt: how a question is put, "{question}" in it; "": the question alone in a chat, else listed.PLAIN.
      stop: texts that end a reply, besides the end of the turn or of the document.
    """

    name = "questions"

    def __init__(
        self, path: str = "", train_path: str = "", prompt: str = "",
        stop: tuple = ("\n",), max_tokens: int = 64,
    ):  # fmt: skip
        super().__init__(path, train_path, prompt)
        if not all(isinstance(text, str) and text for text in stop):
            raise LmtrainError(f"stop is {stop!r}, but takes texts, none of them empty.")
        self.stop, self.max_tokens = tuple(stop), number("max_tokens", max_tokens, 1, 1 << 20)

    def read(self, row: Row, where: str) -> Row:
        listed.text_fields(row, ("question",), where)
        if "answer" not in row:
            raise LmtrainError(f"{where}: no field 'answer': a text, or a list of texts that will do.")
        given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        answers = [str(a) if isinstance(a, int | float) and not isinstance(a, bool) else a for a in given]
        if not answers or not all(isinstance(a, str) and normalised(a) for a in answers):
            raise LmtrainError(f"{where}: answer is {row['answer']!r:.80}, but takes a text with a letter or digit in "
                               "it, or a list of such.")  # fmt: skip
        return {"question": row["question"], "answers": answers}

    def score(self, row: Row, reply: str) -> float:
        return float(normalised(reply) in {normalised(answer) for answer in row["answers"]})

    def answer(self, row: Row, reply: str) -> str:
        """The reply, normalised."""
        return normalised(reply)

    def solution(self, row: Row) -> list[Message]:
        return assistant(row["answers"][0])


def normalised(text: str) -> str:
    """A text as it is compared; see Questions."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
