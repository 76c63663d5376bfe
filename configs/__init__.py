"""Recipes: one YAML file each, opening with its command, its cost and the result to expect.

A package, so that `mixer train NAME` finds them from an installed wheel too (`pipeline.config.find_recipe`).
"""
