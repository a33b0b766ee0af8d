"""Views: pictures of reports. They need the extra `patchjax[viz]`."""

from patchjax.views.heat import heat_map

__all__ = ["heat_map"]
