"""transformers' Trainer for optimisers that evaluate the loss themselves: torch.optim.LBFGS and those of `optim`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import Trainer

from .optim import PPlusBFGS, repeatable


def needs_closure(optimizer: Callable) -> bool:
    """Whether the optimisers of this class must be given one: it says `needs_closure = True`, or is torch's LBFGS."""
    known = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.LBFGS)
    return known or getattr(optimizer, "needs_closure", False)


class Update:
    """The closure of one update: the loss of its micro-batches, and its gradients where gradients are on.

    Gradient accumulation, and what it is divided by, are those of Trainer; the loss is the mean over the processes.
    What Trainer evaluated before it called `step` is what the first call gives, so nothing is evaluated twice.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.model: nn.Module | None = None
        self.evaluations: list[Callable] = []
        self.known: list = []  # what Trainer's own evaluations gave, until it is used
        self.gradients: list[Tensor | None] = []

    def add(self, model: nn.Module, evaluation: Callable):
        """One more micro-batch, evaluated at once, for Trainer."""
        self.model = model
        self.evaluations.append(repeatable(evaluation, model))
        self.known.append(self.evaluations[-1]())
        self.versions = self._versions()
        return self.known[-1]

    def keep_gradients(self) -> None:
        """Those that Trainer left: an optimiser may clear them before it asks for them."""
        self.gradients = [p.grad for p in self._trained()]

    def __call__(self):
        known, self.known = self.known, []
        gradients, self.gradients = self.gradients, []
        if not known or self.versions != self._versions():
            del known, gradients  # a kept graph is freed before the next is made
            known = self._evaluate()
        elif torch.is_grad_enabled():
            for parameter, gradient in zip(self._trained(), gradients, strict=True):
                parameter.grad = gradient
        if isinstance(known[0], tuple):
            return known[0]
        return self.accelerator.reduce(torch.stack(known).sum(), reduction="mean")

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _versions(self) -> list[int]:
        return [p._version for p in self._trained()]

    def _evaluate(self) -> list:
        if not torch.is_grad_enabled():
            with without_backward(self.accelerator):
                return [evaluation() for evaluation in self.evaluations]
        self.model.zero_grad()
        *first, last = self.evaluations
        with self.accelerator.no_sync(self.model):
            known = [evaluation() for evaluation in first]
        return [*known, last()]


@contextlib.contextmanager
def without_backward(accelerator: Accelerator) -> Iterator[None]:
    """Trainer.training_step always goes backward, and a trial of a line search is made without gradients."""
    accelerator.backward = lambda loss, **kwargs: None
    try:
        yield
    finally:
        del accelerator.backward


class SubspaceTrainer(Trainer):
    """transformers.Trainer whose optimiser may need a closure; any other optimiser trains as in Trainer, bit for bit.

    It comes by `optimizers=(PBFGS([theta_d]), None)`, or by `optimizer_cls_and_kwargs=(PBFGS, {})`, which gives it all
    trainable parameters in one group. An update costs no evaluation beyond those of a plain loop. Within it every
    evaluation sees the same dropout, and batch-norm statistics change by the first alone.

    With a closure nothing is clipped: the difference of two clipped gradients says nothing about the curvature.

    Raises:
        ValueError: before training, with a closure: fp16, DeepSpeed, FSDP; `max_grad_norm` that is neither 0 nor the
            default; `weight_decay` with `optimizer_cls_and_kwargs`; accumulation where the optimiser needs logits;
            checkpoints with PPlusBFGS, which trains what an adapter's file does not hold.
    """

    _update: Update | None = None
    _undo: Callable[[], None] | None = None
    _logits = False

    def train(self, *args, **kwargs):
        self._end()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            optimizer, settings = self.optimizer_cls_and_kwargs
            if needs_closure(optimizer):
                if self.args.weight_decay:
                    raise ValueError(
                        f"`weight_decay` must be 0 with {optimizer.__name__}, got {self.args.weight_decay}; add the "
                        "penalty to the loss instead, where a line search sees it."
                    )
                of = self.model if model is None else model
                self.optimizer = optimizer([p for p in of.parameters() if p.requires_grad], **settings)
        super().create_optimizer(model)
        optimizer = self.optimizer
        if isinstance(optimizer, AcceleratedOptimizer):  # of an earlier call of `train`
            optimizer = optimizer.optimizer
        if needs_closure(type(optimizer)) and self._undo is None:
            self._check(optimizer)
            self._begin(optimizer)
        return self.optimizer

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        name, args = type(optimizer).__name__, self.args
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                f"`fp16` must be off with {name}: the gradient scaler would hand it scaled gradients beside an "
                "unscaled loss; take `bf16=True`, or full precision."
            )
        for kind, on in {"DeepSpeed": self.is_deepspeed_enabled, "FSDP": self.is_fsdp_enabled}.items():
            if on:
                raise ValueError(
                    f"{name} must hold its parameters whole, and {kind} shards them; take plain data parallelism: of "
                    "an adapter, it moves d numbers a step."
                )
        if args.max_grad_norm not in (0, type(args).max_grad_norm):
            raise ValueError(
                f"`max_grad_norm` must be 0 with {name}, got {args.max_grad_norm}: differences of clipped gradients "
                "are not the curvature; bound the step by the optimiser's own settings."
            )
        if getattr(optimizer, "needs_logits", False) and args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be 1 with {name}, got {args.gradient_accumulation_steps}: it "
                "needs the logits of the whole batch at once; raise `per_device_train_batch_size`."
            )
        if isinstance(optimizer, PPlusBFGS) and args.save_strategy != "no":
            raise ValueError(
                f"`save_strategy` must be 'no' with {name}, got {args.save_strategy.value!r}: it trains the base too, "
                "which a checkpoint of an adapter leaves out; save `model.merge_and_unload()` after training."
            )

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        clipping, self.args.max_grad_norm = self.args.max_grad_norm, 0.0

        def give_closure(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            self._update.keep_gradients()
            return (optimizer, self._update), {}

        handle = optimizer.register_step_pre_hook(give_closure)

        def undo() -> None:
            self.args.max_grad_norm = clipping
            handle.remove()

        self._undo = undo
        self._logits = getattr(optimizer, "needs_logits", False)

    def _end(self) -> None:
        if self._undo is not None:
            self._undo()
        self._undo = self._update = None

    def get_batch_samples(self, *args, **kwargs):
        if self._undo is not None:
            self._update = Update(self.accelerator)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self._undo is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._logits:
            loss, _, _ = self._update.add(model, partial(self._forward, model, inputs, num_items_in_batch))
            return loss.detach()
        return self._update.add(model, partial(super().training_step, model, inputs, num_items_in_batch))

    def _forward(
        self, model: nn.Module, inputs: dict, num_items: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits and labels, with their graph: the optimiser asks for the gradients of its choice."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(f"A batch must have `labels` for class gradients, got {sorted(inputs)}; name them so.")
        # no backward follows for DDP to prepare for
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items)
        return loss, outputs["logits"] if isinstance(outputs, dict) else outputs[1], labels
