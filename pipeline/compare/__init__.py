"""`mixer compare`: systems side by side, each comparison a table (markdown), a picture (PNG) and its facts (JSON).

One module a comparison, `launch/compare/NAME.py` its command; `chart.py` draws for all, `report.py` writes for all.
"""
