"""What training scripts and servers of their own experts need of torch: the public names."""

from p2pmoe.experts.blocks import register_expert
from p2pmoe.experts.serving import ServerConfig, serve_experts
from p2pmoe.experts.uid import ExpertUid, Grid
from p2pmoe.moe.layer import DMoE, MixtureInfo
from p2pmoe.moe.remote import RemoteExpert

__all__ = [
    "DMoE",
    "ExpertUid",
    "Grid",
    "MixtureInfo",
    "RemoteExpert",
    "ServerConfig",
    "register_expert",
    "serve_experts",
]
