"""`hydra/launcher=pool`, where Hydra looks for it: it takes plugins from the package `hydra_plugins` alone."""

from charlm import launcher


class PoolLauncher(launcher.PoolLauncher):
    """See charlm/launcher.py."""
