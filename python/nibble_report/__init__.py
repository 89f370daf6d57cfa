"""One self-contained HTML page from the JSON that nibble's commands write.

read.py       files -> JSON values, strictly
runs.py       what is kept of each command's output
recognize.py  JSON values -> runs; anything else is an error that names the file
summary.py    numbers over runs: per mode, per linear type, the verdict
figures.py    matplotlib figures; svg.py makes them follow the page's colours
markup.py     HTML that escapes by default
sections_*.py the sections; page.py puts them together
"""
