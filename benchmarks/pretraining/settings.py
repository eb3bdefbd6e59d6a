"""How large the runs are: a budget has a name, and everything that a cell's result depends on but method and seed."""

from dataclasses import dataclass, field

from .training import Size


@dataclass(frozen=True)
class Budget:
    """Of a run.

    Attributes:
        size: of the model and its steps.
        steps: of a run that spends nothing on its mixture; any other gets the same operations all in all.
        stages: of methods that measure, if nothing ends them earlier.
        max_stages: of those that decide by influence; the last one goes on to the end. None: no limit.
        probe_sequences, task_sequences, curvature_sequences: of a measurement, as `MixtureController` takes them.
        curvature: of TiKMiX's. Damped ten times as much as by default where a measurement has few sequences of each
            domain: directions of little curvature are noise there.
        confidence: of TiKMiX-D. Half its default where a measurement has few sequences, which would decide little.
        loss_steps: optimizer steps a stage, of methods that learn from the training loss.
        proxy: size of the proxies' models.
        proxy_share: of all operations, what methods with proxies spend on them.
        mixtures: that RegMix trains a proxy on, and MDE beside an expert a domain: the first is for RegMix.
        pool: share of the run's tokens that AutoMixer scores and regroups: all of the corpus would be many times more.
        examples: of each task, of those that mixers see and of those that judge.
        curve_examples, curve: examples of a task, and how often it is evaluated while a run goes on.
        characters: of each domain's held-out text that judge.
    """

    size: Size = field(default_factory=Size)
    steps: int = 400
    stages: int = 4
    max_stages: int | None = None
    probe_sequences: int = 16
    task_sequences: int = 32
    curvature_sequences: int = 64
    curvature: str = "EKFAC:1"
    confidence: float = 0.25
    loss_steps: int = 10
    proxy: Size = field(default_factory=lambda: Size(hidden=32, layers=2, heads=2, batch=8, rate=5e-3))
    proxy_share: float = 0.2
    mixtures: tuple[int, int] = (16, 8)
    pool: float = 0.5
    examples: int = 200
    curve_examples: int = 64
    curve: int = 8
    characters: int = 24_000


BUDGETS = {
    "tiny": Budget(
        size=Size(hidden=32, layers=2, heads=2, batch=8),
        steps=48, probe_sequences=4, task_sequences=8, curvature_sequences=8, loss_steps=4,
        proxy=Size(hidden=16, layers=1, heads=1, batch=2, rate=5e-3), proxy_share=0.5, mixtures=(4, 3),
        examples=16, curve_examples=8, curve=3, characters=2_000,
    ),
    "swift": Budget(
        size=Size(hidden=64, layers=2, heads=2, batch=16, rate=5e-3),
        steps=500, stages=5, probe_sequences=6, task_sequences=24, curvature_sequences=32,
        proxy=Size(hidden=32, layers=1, heads=2, batch=8, rate=7e-3),
        examples=120, curve_examples=32, curve=6, characters=12_000,
    ),
    # The same model for eight times as long, so that a measurement takes the share of the run that it has in use. One
    # of as many probes and examples as the library takes by default, after a tenth of the run, decides to the end.
    "steady": Budget(
        size=Size(hidden=64, layers=2, heads=2, batch=16, rate=5e-3),
        steps=4000, stages=10, max_stages=2, probe_sequences=64, task_sequences=128, curvature_sequences=32,
        curvature="EKFAC:0.1", confidence=0.5,
        proxy=Size(hidden=32, layers=1, heads=2, batch=8, rate=7e-3),
        examples=120, curve_examples=64, curve=10, characters=12_000,
    ),
    "half": Budget(steps=200),
    "small": Budget(),
    "double": Budget(steps=800),
}  # fmt: skip
