"""A frozen model that plays the user of a chat room."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh

from lmtrain.data.chat import Template
from lmtrain.engine import Engine, Sampling
from lmtrain.rollout.episodes import Episode, Message, seed_of
from lmtrain.types import Frozen

SWAPPED = {"user": "assistant", "assistant": "user", "system": "system", "tool": "user"}


class ModelUser:
    """Answers as a chat model trained on conversations whose roles are swapped: its assistant is our user.

    It reads the persona, where the task's rows have one (`row["persona"]`), as its system line. Its reply to a
    conversation depends on the conversation's seed and turn alone. It never ends a conversation; `turns` does.
    """

    def __init__(self, frozen: Frozen, template: Template, mesh: Mesh | None, max_tokens: int = 64, slots: int = 64):
        self.frozen, self.template, self.max_tokens = frozen, template, max_tokens
        self.engine = Engine(frozen.forward.cfg, mesh, slots=slots)

    def __call__(self, episodes: Sequence[Episode]) -> list[list[Message] | None]:
        for e in episodes:
            how = Sampling(self.max_tokens, 1.0, stop=self.template.stop, seed=seed_of(e.seed, e.turns, "user"))
            self.engine.submit(self.template.prompt(self._swapped(e)), how, tag=e)
        said: dict[int, str] = {}
        while len(said) < len(episodes):
            for e, completion in self.engine.step(self.frozen.params):
                said[id(e)] = self.template.parse(completion.reply)["content"]
        return [[{"role": "user", "content": said[id(e)]}] if said[id(e)].strip() else None for e in episodes]

    def _swapped(self, e: Episode) -> list[Message]:
        persona = [{"role": "system", "content": e.row["persona"]}] if e.row.get("persona") else []
        talk = [m for m in e.messages if m["role"] != "system" and m["content"]]
        return persona + [{"role": SWAPPED[m["role"]], "content": m["content"]} for m in talk]
