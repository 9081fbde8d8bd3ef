"""Train a classifier of handwritten digits whose hidden layer lives in a swarm.

    p2pmoe node --new-swarm --grid 'ffn.[0:8].[0:8]' --hidden-dim 512 --experts 16
    python docs/examples/digits.py --peer 127.0.0.1:4747

The dense layers and the gate learn here, the experts on their servers.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import p2pmoe
from p2pmoe.nn import DMoE

parser = argparse.ArgumentParser(description="Train on digits over a swarm.")
parser.add_argument("--peer", action="append", required=True, help="HOST:PORT of any peer")
parser.add_argument("--grid", default="ffn", help="name of the grid to use")
parser.add_argument("--hidden-dim", type=int, default=512, help="width of its rows")
parser.add_argument("--experts", type=int, default=1, help="wait for so many")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

pixels, digits = load_digits(return_X_y=True)
x = torch.tensor(pixels, dtype=torch.float32) / 16
y = torch.tensor(digits)
train, test = torch.randperm(len(x)).split([1437, 360])

with p2pmoe.connect(args.peer) as swarm:
    found = swarm.wait_for(args.grid, experts=args.experts)
    print(f"{found} experts of {args.grid}")
    moe = DMoE(swarm, args.grid, in_features=args.hidden_dim, k_best=4)
    before = nn.Sequential(nn.Linear(64, args.hidden_dim), nn.LayerNorm(args.hidden_dim))
    after = nn.Sequential(nn.LayerNorm(args.hidden_dim), nn.Linear(args.hidden_dim, 10))
    model = nn.Sequential(before, moe, after)
    optimizer = torch.optim.Adam(model.parameters())  # dense layers and gate; no experts

    for step in range(1, args.steps + 1):
        rows = train[torch.randint(len(train), (64,))]
        hidden, info = moe(before(x[rows]), return_info=True)
        loss = nn.functional.cross_entropy(after(hidden), y[rows])
        optimizer.zero_grad()
        (loss + 0.05 * info.balancing_loss).backward()  # experts take a step on their servers
        optimizer.step()
        if step % 20 == 0 or step == args.steps:
            print(f"step {step}  loss {loss:.3f}  {info.experts_per_row:.2f} experts a row")

    model.eval()
    with torch.no_grad():
        right = model(x[test]).argmax(dim=1) == y[test]
    print(f"accuracy on {len(test)} held-out digits: {right.float().mean():.3f}")
