"""Train: python train.py --cfg-path projects/aurora/demo_ret.yaml"""

from lavis_aurora_cli import train

if __name__ == "__main__":
    train()
