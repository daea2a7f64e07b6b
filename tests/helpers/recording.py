"""Mixins for modules that record losses and gradients."""


class RecordsLosses:
    """Records each step's loss, unrounded, in `losses`."""

    def log_dict(self, metrics, **kwargs):
        if "train/loss" in metrics:
            self.losses = [*getattr(self, "losses", []), metrics["train/loss"]]
        super().log_dict(metrics, **kwargs)


class RecordsGradients:
    """Records full gradients of every optimizer step: in `steps` before clipping, in `clipped` after it."""

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        self.steps = [*getattr(self, "steps", []), self.gradients()]
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.clipped = [*getattr(self, "clipped", []), self.gradients()]

    def gradients(self):
        held = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in held.items()}
