"""Machines that are busy take their time: no example is a failure because it took long."""

import hypothesis

hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
