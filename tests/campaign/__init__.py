"""Bad input by the thousand: files of data, configs and command lines, each read right or refused.

``make campaign`` runs it and writes what came out to ``docs/campaign.md``; ``tests/test_bad_input.py``
runs a sample of it. No file here is collected by pytest.
"""
