"""The schedulers' names; see fanlight.contract.schedulers."""

from fanlight.contract.schedulers import (
    CLASSES,
    EXPONENTIAL,
    KARRAS,
    NOISE_SCHEDULES,
    SCHEDULE_TITLES,
    SCHEDULERS,
    SGM_UNIFORM,
    SHORT_NAMES,
    SchedulerName,
    resolve,
)

__all__ = [
    "CLASSES",
    "EXPONENTIAL",
    "KARRAS",
    "NOISE_SCHEDULES",
    "SCHEDULERS",
    "SCHEDULE_TITLES",
    "SGM_UNIFORM",
    "SHORT_NAMES",
    "SchedulerName",
    "resolve",
]
