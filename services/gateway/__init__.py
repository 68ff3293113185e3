"""The gateway: takes jobs from clients and hands tasks to workers. Loads no model and decodes no image."""
