"""Results of an evaluation: as files, on the terminal, and beside those of other runs.

- ``names``: names of conditions, and numbers as people read them
- ``results``: all numbers of an evaluation, written and read
- ``report``: writes the report as Markdown and as one page of HTML
- ``headline``, ``sections``: its first line, its sections
- ``audit``, ``budgets``, ``groups``, ``ensembles``, ``distances``, ``corruptions``, ``certified``,
  ``optimality``: sections on one subject each
- ``figures``, ``curves``: its figures
- ``page``: blocks of text in both languages
- ``terminal``: the table on the terminal
- ``comparison``, ``comparison_page``: several runs, image by image, and their page of HTML

Nothing is imported here: only ``figures``, ``curves`` and what draws need matplotlib.
"""
