"""Evaluate: python evaluate.py --cfg-path projects/aurora/demo_ret.yaml"""

from lavis_aurora_cli import evaluate

if __name__ == "__main__":
    evaluate()
