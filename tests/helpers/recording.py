"""Mixed into a module, they keep what it would otherwise only pass on."""


class RecordsLosses:
    """Each step's loss unrounded, in `losses`."""

    def log_dict(self, figures, **kwargs):
        if "train/loss" in figures:
            self.losses = [*getattr(self, "losses", []), figures["train/loss"]]
        super().log_dict(figures, **kwargs)


class RecordsGradients:
    """Whole gradients of every optimizer step: in `steps` before they are clipped, in `clipped` after."""

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        self.steps = [*getattr(self, "steps", []), self.gradients()]
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.clipped = [*getattr(self, "clipped", []), self.gradients()]

    def gradients(self):
        held = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in held.items()}
