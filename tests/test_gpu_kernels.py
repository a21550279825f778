"""Which kernels are taken for attention, by the names that torch, cuDNN, TensorRT and Inductor give them."""

from __future__ import annotations

import pytest

from sqa_fx.gpu_kernels import KernelTime, attention_kernels


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", True),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", True),
        ("fmha_v2_flash_attention_fp16_S_40_causal_sm86_kernel_nl", True),
        ("_gemm_mha_v2_0x8915cd4a", True),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, true>", True),
        ("triton_tem_fused_flex_attention_0", True),
        ("triton_per_fused__softmax_add_3", True),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_2", False),
        ("triton_red_fused__log_softmax_5", False),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", False),
    ],
)
def test_attention_is_known_by_name(name: str, attention: bool) -> None:
    kernel = KernelTime(name, 2, 1500.0)
    assert kernel.attention == attention
    assert attention_kernels([kernel]) == (f"2 x {name[:70]} 1.500 ms" if attention else "none seen")
