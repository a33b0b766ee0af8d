"""What data says about parameters."""

from patchjax.statistics.fisher import Fisher, fisher_diagonal

__all__ = ["Fisher", "fisher_diagonal"]
