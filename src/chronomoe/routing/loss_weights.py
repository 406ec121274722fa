"""LossWeights: how much each router loss counts. Imports nothing heavy."""

from dataclasses import dataclass

from chronomoe.settings import NonNegative, Settings


@dataclass(frozen=True, kw_only=True)
class LossWeights(Settings):
    """Weights of the router losses; 0 leaves one out."""

    lambda_balance: NonNegative = 0.01
    """Weight of the load-balancing loss (1.0 = balanced)."""
    lambda_coherence: NonNegative = 0.001
    """Weight of the coherence loss."""
    lambda_valley: NonNegative = 0.0001
    """Weight of the valley loss."""
    lambda_z: NonNegative = 0.001
    """Weight of the router z-loss."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight by name of the term."""
        return {
            "balance": self.lambda_balance,
            "coherence": self.lambda_coherence,
            "valley": self.lambda_valley,
            "z": self.lambda_z,
        }
