# cargo_vendor.sh INDEX: a project with one dependency from the sparse index at INDEX, downloaded.
set -e
rm -rf project && mkdir -p project/src project/.cargo && cd project
printf '[registries.real]\nindex = "sparse+%s"\n' "$1" >.cargo/config.toml
printf '[package]\nname = "project"\nversion = "0.1.0"\nedition = "2021"\n[dependencies]\ntiny-real = { version = "1", registry = "real" }\n' >Cargo.toml
: >src/lib.rs
export CARGO_HOME="$PWD/../.cargo" CARGO_NET_RETRY=0
cargo vendor -q 2>&1  # unlike `cargo fetch`, asks no rustc
