"""What ranks are asked to do with trained models (few-shot features, logits) and with the models of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader, InitialState, load_pieces
from pipeline.checkpoint.manager import CheckpointManager, Retention, step_folder
from pipeline.data.augment import EvalTransform
from pipeline.data.loader import Batch, Share, TrainSamples, eval_batches
from pipeline.data.synthetic import SyntheticSource
from pipeline.evaluate import Detail, RealLabels
from pipeline.fewshot import FewShot
from pipeline.losses import make_loss
from pipeline.model import create_model
from pipeline.model.timm_compat import import_timm
from pipeline.model.timm_wrap import wrap
from pipeline.optim import param_groups
from pipeline.parallel.engine import EngineOptions, make_engine
from pipeline.parallel.world import World
from pipeline.weights.trained import TrainedModel, features_of

IMAGE, CLASSES = 15, 10


def fewshot(world: World, run: str, strategy: str) -> tuple[dict[Any, float], int, int]:
    """(accuracies, samples, parameters held on this rank)."""
    predictor = TrainedModel.open(run).load(world, strategy)
    sources = [
        SyntheticSource(s, image_size=IMAGE, num_classes=CLASSES, samples=n) for s, n in (("train", 301), ("val", 97))
    ]
    probe = FewShot.of(*sources, image_size=IMAGE, channels=3, shots=[2, 9], seeds=[0, 1], batch_size=7)
    result = probe.run(predictor.features, world)
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in predictor.model.parameters())
    return result.top1, result.samples, held


def logits(world: World, run: str, strategy: str) -> torch.Tensor:
    """Of this rank's part of a split."""
    predictor = TrainedModel.open(run).load(world, strategy)
    source = SyntheticSource("val", image_size=IMAGE, num_classes=CLASSES, samples=11)
    batches = eval_batches(
        TrainSamples(source, EvalTransform(IMAGE), channels=3, num_classes=CLASSES),
        rank=world.rank, world_size=world.size, batch_size=3, num_workers=0,
    )  # fmt: skip
    return torch.cat([predictor.logits(b)[b.weights > 0] for b in batches])


def real_accuracy(world: World, real: dict[str, list[int]]) -> tuple[float, int] | str:
    """(ReaL top-1, samples with labels) of one that takes image i for class i % CLASSES; or why it was refused."""
    labels, failure = None, ""
    source = SyntheticSource("val", image_size=IMAGE, num_classes=CLASSES, samples=97)
    try:
        labels = RealLabels(real).of_samples(source, world)
    except UserError as e:
        failure = str(e)
    world.barrier()  # stuck here, if some of them went on
    if failure:
        return failure
    detail = Detail(CLASSES, labels)
    for batch in eval_batches(
        TrainSamples(source, EvalTransform(IMAGE), channels=3, num_classes=CLASSES),
        rank=world.rank, world_size=world.size, batch_size=7, num_workers=0,
    ):  # fmt: skip
        detail.add(batch, torch.eye(CLASSES)[batch.ids % CLASSES])
    detail.reduce(world)
    return detail.real_top1, detail.real_samples


# ------------------------------------------------------------------------------------------- models of timm


TIMM_BATCH = 6
TIMM_SIZE = {"vit": 16, "bit": 32, "nfnet": 32, "halonet": 32}


def timm_model(name: str, device: str) -> Any:
    """Tiny relatives of the compared models; keyed stochastic depth in all, keyed dropout in the ViT."""
    if name == "vit":
        return create_model("timm/vit_base_patch16_224", CLASSES, 16, device=device, patch_size=8, hidden_dim=66,
                            num_blocks=2, drop_path_rate=0.3, drop_rate=0.2)  # fmt: skip
    if name == "bit":
        return create_model("timm/resnetv2_50x1_bit", CLASSES, 32, device=device, hidden_dim=128, num_blocks=1,
                            drop_path_rate=0.3)  # fmt: skip
    import_timm()
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
    from timm.models.nfnet import NfCfg, NormFreeNet

    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "nfnet":  # as DeepMind's: skipinit gives every block a gain without dimensions
            cfg = NfCfg((1, 1, 1, 1), (32, 32, 48, 48), stem_type="3x3", stem_chs=16, group_size=8, extra_conv=True,
                        gamma_in_act=True, same_padding=True, skipinit=True, num_features=40, act_layer="gelu",
                        attn_layer="se", attn_kwargs={"rd_ratio": 0.5})  # fmt: skip
            return wrap(NormFreeNet(cfg, num_classes=CLASSES, drop_path_rate=0.3))
        blocks = (
            ByoBlockCfg(type="bottle", d=1, c=32, s=1, gs=0, br=0.5),
            ByoBlockCfg(type="self_attn", d=2, c=48, s=2, gs=0, br=0.5),
        )
        halo = ByoModelCfg(blocks=blocks, stem_type="3x3", stem_chs=16, stem_pool="", self_attn_layer="halo",
                           self_attn_kwargs={"block_size": 4, "halo_size": 1, "dim_head": 8})  # fmt: skip
        return wrap(ByobNet(halo, num_classes=CLASSES, drop_path_rate=0.3))


def timm_batch(name: str, step: int, drop_rates: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(500 + step)
    size = TIMM_SIZE[name]
    images = torch.randint(0, 256, (TIMM_BATCH, 3, size, size), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (TIMM_BATCH,), generator=g)
    keep = (torch.rand(TIMM_BATCH, len(drop_rates), generator=g) >= torch.tensor(drop_rates)).float()
    return images, labels, keep


class TimmSession:
    """One engine over a tiny timm model."""

    def __init__(self, world: World, name: str, strategy: str, micro: int, recompute: str = "none"):
        self.world, self.name = world, name
        self.share = Share.of(world.rank, world.size, TIMM_BATCH, micro)
        model = timm_model(name, "meta")
        self.rates = model.drop_rates()
        options = EngineOptions(
            strategy, "fp32", TIMM_BATCH, self.share.micro_batch_size, self.share.micro_steps, (0.9, 0.999), 1e-8, 1.0,
            activation_checkpointing=recompute,
        )  # fmt: skip
        self.engine = make_engine(model, param_groups(model, 0.1), make_loss("softmax_xent"), options, world)
        self.engine.warm_up(self.slots(0, blank=True)[0])

    def slots(self, step: int, blank: bool = False) -> list[Batch]:
        images, labels, keep = timm_batch(self.name, step, self.rates)
        size, share = self.share.micro_batch_size, self.share
        rows = list(range(share.first, share.last))
        rows += [-1] * (size * share.micro_steps - len(rows))
        found = []
        for i in range(0, len(rows), size):
            at = torch.tensor(rows[i : i + size])
            used = (at >= 0).float() * (0 if blank else 1)
            empty = torch.zeros(size, dtype=torch.int64)
            found.append(
                Batch(images[at] * used.bool()[:, None, None, None], labels[at], used, keep[at], at, empty, [])
            )
        return found

    def load(self, source: Any, step: int) -> None:
        load_pieces(self.engine.pieces(), source)
        self.engine.finish_load(step)

    def initial(self) -> InitialState:
        """timm's own values; a head, gains and positions that are not zero, so that every gradient is alive."""
        values = timm_model(self.name, "cpu").state_dict()
        g = torch.Generator().manual_seed(3)
        for n, v in values.items():
            if v.is_floating_point() and v.abs().sum() == 0 and "running" not in n and "bias" not in n:
                v.copy_(0.2 * torch.randn(v.shape, generator=g))
        return InitialState(values.__getitem__)

    def step(self, step: int) -> float:
        stats, _ = self.engine.train_step(self.slots(step), 3e-3)
        return self.world.sum([float(stats.loss)])[0] / TIMM_BATCH

    def save(self, root: str, step: int) -> str:
        manager = CheckpointManager(Path(root), self.world, Retention())
        state = {"optimizer_step": self.engine.optimizer_step}
        manager.save(step, self.engine.tensors(), self.engine.owned(), state, metrics={}, written_by={})
        return str(step_folder(Path(root), step))

    def close(self) -> None:
        destroy = getattr(self.engine.model, "destroy", None)
        if destroy is not None:
            destroy()


def timm_interrupted(
    world: World, name: str, strategy: str, root: str, micro: int = 2, recompute: str = "none"
) -> tuple[list[float], list[float], str, str]:
    """(losses of 4 steps, those of the last two after a resume, both final checkpoints)."""
    s = TimmSession(world, name, strategy, micro, recompute)
    s.load(s.initial(), 0)
    whole = [s.step(0), s.step(1)]
    middle = s.save(root, 2)
    whole += [s.step(2), s.step(3)]
    end = s.save(f"{root}/whole", 4)
    s.close()
    resumed = TimmSession(world, name, strategy, micro, recompute)
    resumed.load(CheckpointReader(Path(middle)), 2)
    losses = [resumed.step(2), resumed.step(3)]
    again = resumed.save(f"{root}/resumed", 4)
    resumed.engine.verify()
    resumed.close()
    return whole, losses, end, again


def timm_go_on(world: World, name: str, strategy: str, source: str) -> list[float]:
    """Two steps from a checkpoint that others wrote."""
    s = TimmSession(world, name, strategy, 2)
    s.load(CheckpointReader(Path(source)), 2)
    losses = [s.step(2), s.step(3)]
    s.close()
    return losses


def fewshot_in_training(world: World, strategy: str) -> dict[Any, float]:
    """The probe under a training engine, as the trainer runs it."""
    import engine_cases

    sources = [
        SyntheticSource(s, image_size=IMAGE, num_classes=CLASSES, samples=n) for s, n in (("train", 90), ("val", 53))
    ]
    probe = FewShot.of(*sources, image_size=IMAGE, channels=3, shots=[2], seeds=[0], batch_size=7)
    with engine_cases.session(world, engine_cases.Spec(strategy)) as s:
        s.load(None)
        s.step(0)
        return probe.run(features_of(s.engine.model, s.engine.predict), world).top1
