"""`hydra/launcher=checked`, of sample.py, where Hydra looks for it: it takes plugins from `hydra_plugins` alone."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from omegaconf import open_dict

from charlm.config import SampleConfig


class CheckedLauncher(BasicLauncher):
    """Hydra's own launcher, one job after another in one process, but for settings that cannot work: they are refused
    before the first job writes.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs.

        Raises:
            InputError: a job has a value that is missing or out of its bounds.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        for overrides in job_overrides:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                del composed["hydra"]
            SampleConfig.of(composed)
        return super().launch(job_overrides, initial_job_idx)
