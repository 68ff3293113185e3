"""Machines that are busy take their time: no example is a failure because it took long."""

import hypothesis

hypothesis.settings.register_profile("patient", deadline=None, max_examples=60)
hypothesis.settings.load_profile("patient")
