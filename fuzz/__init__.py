"""Fuzzing of everything that is read from somebody who is not trusted. docs/fuzzing.md says what is promised.

python -m fuzz --seconds 60 [--target NAME ...]     coverage-guided, by atheris
pytest tests/fuzz                                   every target for a moment, by hypothesis
"""
