"""The sections of the run configuration, one file each.

A key's short name is unique among all sections, so ``epsilon`` and ``privacy.epsilon`` are one key.
`fedlora_flwr.config.RunConfig` inherits from every section. A function that needs one section only
is typed with that section; it accepts a whole run's configuration or the section alone.
"""

from __future__ import annotations

from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.sections.as_lora import ASLoRASection
from fedlora_flwr.config.sections.data import DataSection
from fedlora_flwr.config.sections.federation import FederationSection
from fedlora_flwr.config.sections.lora import LoRASection
from fedlora_flwr.config.sections.partition import PartitionSection
from fedlora_flwr.config.sections.privacy import PrivacySection
from fedlora_flwr.config.sections.run import RunSection
from fedlora_flwr.config.sections.task import TaskSection
from fedlora_flwr.config.sections.training import TrainingSection

__all__ = [
    "SECTIONS",
    "SECTION_OF",
    "ASLoRASection",
    "DataSection",
    "FederationSection",
    "LoRASection",
    "PartitionSection",
    "PrivacySection",
    "RunSection",
    "TaskSection",
    "TrainingSection",
]

SECTIONS: dict[str, type] = {
    "task": TaskSection,
    "data": DataSection,
    "partition": PartitionSection,
    "federation": FederationSection,
    "as-lora": ASLoRASection,
    "lora": LoRASection,
    "training": TrainingSection,
    "privacy": PrivacySection,
    "run": RunSection,
}
"""The sections by name, in the order in which a configuration is written."""

SECTION_OF = {key: name for name, section in SECTIONS.items() for key in fields_by_key(section)}
"""The section of each key, by its short name."""
