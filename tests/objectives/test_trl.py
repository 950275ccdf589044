"""The same numbers as TRL's losses, where TRL is installed: its trainers' loss methods, on a stand-in for the trainer.

The model is the bigram of conftest.py on both sides. Packed rows on ours, one conversation a row on TRL's.
"""

import types
from unittest import mock

import numpy as np
import pytest

from lmtrain.objectives import policy
from lmtrain.objectives.distill import Gkd, gkd
from lmtrain.objectives.policy import Cispo, Dapo, DrGrpo, Grpo, Gspo, Rloo
from lmtrain.objectives.preference import Dpo, DpoNorm, Ipo, Kto, Orpo, SimPo, dpo, dpo_norm, ipo, kto, orpo, simpo
from lmtrain.types import Frozen

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
SIZES, PACKED, T = [(4, 2), (6, 3), (12, 5), (3, 2), (10, 2), (7, 4)], [[0, 1], [2, 3], [4, 5]], 24


def method(path, name):
    """A loss method of a TRL trainer, to be called with a stand-in for the trainer."""
    module, _, trainer = path.rpartition(".")
    return getattr(getattr(pytest.importorskip(module), trainer), name, None) or pytest.skip(f"no {name} in this TRL")


def trainer(**fields):
    """Says what is given; anything else (metrics, accelerator) is a mock that swallows it."""
    self = mock.MagicMock()
    self.accelerator.gather_for_metrics = self.accelerator.gather = lambda x: x
    off = dict(use_vllm=False, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
               _entropy_bonus_enabled=False, use_weighting=False, ld_alpha=None, f_divergence_type="reverse_kl",
               precompute_ref_logps=True, alpha=0.0, label_smoothing=0.0, _total_train_tokens=0)  # fmt: skip
    for name, value in {**off, **fields}.items():
        setattr(self, name, value)
    return self


def padded(arrays):
    out = torch.zeros(len(arrays), T, dtype=torch.tensor(arrays[0]).dtype)
    for i, x in enumerate(arrays):
        out[i, : len(x)] = torch.tensor(x)
    return out


def inputs(talks):
    """input_ids, attention and completion masks as TRL's collators make them: the mask is on the token itself."""
    completion = [np.concatenate([[0], c["weights"][:-1]]) for c in talks]
    ids = padded([c["tokens"] for c in talks])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": padded(completion)}


@pytest.fixture(scope="module")
def talks(toy):
    rng = np.random.default_rng(11)
    draw = lambda n: -2 + 0.3 * rng.normal(size=n)  # noqa: E731
    return [
        toy.conversation(
            rng, n, p, ref_logps=draw, old_logps=draw, advantages=rng.normal(), labels=[1, 0, -1, 0, 1, 0][i]
        )
        for i, (n, p) in enumerate(SIZES)
    ]


def summed(c, name):
    return (c[name] * c["weights"]).sum()


@pytest.fixture(scope="module")
def model(toy):
    table = torch.tensor(toy.parameters()["table"])
    return lambda input_ids, **_: types.SimpleNamespace(logits=table[input_ids])


def ours(toy, objective, talks, cfg, **extra):
    return toy.run(objective, toy.parameters(), toy.rows(talks, PACKED, T) | extra, cfg)[0]


@pytest.mark.parametrize(
    "objective, cfg, loss_type",
    [(dpo, Dpo(), "sigmoid"), (dpo_norm, DpoNorm(), "sigmoid_norm"), (ipo, Ipo(average=True), "ipo")],
)
def test_dpo(toy, talks, model, objective, cfg, loss_type):
    batch = inputs(talks[0::2] + talks[1::2])
    for name, some in (("chosen", talks[0::2]), ("rejected", talks[1::2])):
        batch[f"ref_{name}_logps"] = torch.tensor([summed(c, "ref_logps") for c in some])
    self = trainer(beta=cfg.beta, loss_types=[loss_type], loss_weights=[1.0])
    model = mock.MagicMock(side_effect=model)
    theirs = method("trl.trainer.dpo_trainer.DPOTrainer", "_compute_loss")(self, model, batch, False)
    assert ours(toy, objective, talks, cfg) == pytest.approx(float(theirs), abs=1e-6)


def test_kto(toy, talks, model):
    cfg = Kto(beta=0.3, desirable=1.1, undesirable=0.8)
    real, mismatched = talks[0::2], talks[1::2]
    batch = inputs(real) | {
        "label": [True, False, True],
        "ref_logps": torch.tensor([summed(c, "ref_logps") for c in real]),
    }
    batch["ref_KL_logps"] = torch.tensor([summed(c, "ref_logps") for c in mismatched])
    self = trainer(beta=cfg.beta, loss_type="kto", calculate_KL=True, desirable_weight=1.1, undesirable_weight=0.8)
    mean = torch.tensor([(toy.logps(toy.parameters(), c) * c["weights"]).sum() for c in mismatched])
    self._compute_kl_logps = lambda *_: mean
    self.accelerator.device = "cpu"
    model = mock.MagicMock(side_effect=model)
    theirs = method("trl.trainer.kto_trainer.KTOTrainer", "_compute_loss")(self, model, batch, False)
    assert ours(toy, kto, talks, cfg) == pytest.approx(float(theirs), abs=1e-6)


def test_simpo_and_orpo(toy, talks):
    means = [(toy.logps(toy.parameters(), c) * c["weights"]).sum() / c["weights"].sum() for c in talks]
    chosen, rejected = torch.tensor(means[0::2]), torch.tensor(means[1::2])
    self = trainer(beta=2.0, simpo_gamma=0.7, loss_type="simpo")
    self.accelerator.device = "cpu"
    losses, *_ = method("trl.experimental.cpo.cpo_trainer.CPOTrainer", "cpo_loss")(self, chosen, rejected)
    assert ours(toy, simpo, talks, SimPo(beta=2.0, gamma=0.7)) == pytest.approx(float(losses.mean()), abs=1e-6)
    self.beta = 0.4
    losses, *_ = method("trl.experimental.orpo.orpo_trainer.ORPOTrainer", "odds_ratio_loss")(self, chosen, rejected)
    assert ours(toy, orpo, talks, Orpo(beta=0.4)) == pytest.approx(float((-chosen - losses).mean()), abs=1e-6)


POLICIES = [
    ("grpo", Grpo(beta=0.2, kl="k3"), dict(loss_type="grpo", importance_sampling_level="token")),
    ("dapo", Dapo(), dict(loss_type="dapo", importance_sampling_level="token")),
    ("dr_grpo", DrGrpo(max_length=T), dict(loss_type="dr_grpo", importance_sampling_level="token")),
    ("gspo", Gspo(clip_low=0.05, clip_high=0.1), dict(loss_type="grpo", importance_sampling_level="sequence")),
    ("cispo", Cispo(cap=1.2), dict(loss_type="cispo", importance_sampling_level="token")),
    ("rloo", Rloo(), None),
]


@pytest.mark.parametrize("name, cfg, fields", POLICIES, ids=lambda x: x if isinstance(x, str) else "")
def test_policies(toy, talks, name, cfg, fields):
    params = toy.parameters()
    mask = padded([c["weights"] for c in talks])
    logps = padded([toy.logps(params, c) for c in talks])
    old, ref = (padded([c[k] for c in talks]) for k in ("old_logps", "ref_logps"))
    batch = {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask, "completion_mask": mask}
    batch |= {"advantages": torch.tensor([c["advantages"][0] for c in talks]), "old_per_token_logps": old}
    batch |= {"ref_per_token_logps": ref, "num_items_in_batch": mask.sum(), "old_logps": (old * mask).sum(1)}
    if fields is None:  # of a policy near enough that not every sum is clipped
        talks = [c | {"old_logps": toy.logps(params, c) + 0.1 * c["ref_logps"] + 0.2} for c in talks]
        batch["old_logps"] = torch.tensor([summed(c, "old_logps") for c in talks])
    low, high = getattr(cfg, "clip_low", 0.0), getattr(cfg, "clip_high", None) or cfg.cap
    self = trainer(beta=cfg.beta, epsilon_low=low, epsilon_high=high, max_completion_length=T, **fields or {})
    self.args.delta, self.args.use_bias_correction_kl = None, False
    self.current_gradient_accumulation_steps, self.accelerator.num_processes = 1, 1
    self._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
    where = "trl.trainer.grpo_trainer.GRPOTrainer" if fields else "trl.trainer.rloo_trainer.RLOOTrainer"
    theirs = method(where, "_compute_loss")(self, mock.MagicMock(), batch)
    assert ours(toy, getattr(policy, name), talks, cfg) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd(toy, talks, beta):
    teacher = Frozen(params=toy.parameters(seed=9), forward=toy.Bigram())
    ids = padded([c["tokens"] for c in talks])
    labels = torch.where(padded([c["weights"] for c in talks]) > 0, 0, -100)
    student_teacher = (torch.tensor(p["table"])[ids] for p in (toy.parameters(), teacher.params))
    loss = method("trl.experimental.gkd.gkd_trainer.GKDTrainer", "generalized_jsd_loss")
    theirs = loss(*student_teacher, labels=labels, beta=beta, temperature=1.3)
    assert ours(toy, gkd, talks, Gkd(beta, 1.3), teacher=teacher) == pytest.approx(float(theirs), abs=1e-6)
