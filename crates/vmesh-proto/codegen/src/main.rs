//! Writes `vmesh-proto`'s Rust types and descriptor set from the descriptors inside an Envoy binary.
//!
//! Every Envoy binary embeds the serialized `FileDescriptorProto` of each proto it was built with. Reading them
//! there, rather than from a checkout of the protos, gives exactly the messages that this Envoy accepts: no
//! `protoc`, no submodule, nothing ahead of or behind the proxy that we install.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};

use prost::Message;
use prost_types::{FileDescriptorProto, FileDescriptorSet};

/// The files whose messages vmesh names; their imports come along.
const ROOTS: &[&str] = &[
    "envoy/config/bootstrap/v3/bootstrap.proto",
    "envoy/config/cluster/v3/cluster.proto",
    "envoy/config/endpoint/v3/endpoint.proto",
    "envoy/config/listener/v3/api_listener.proto",
    "envoy/config/listener/v3/listener.proto",
    "envoy/config/rbac/v3/rbac.proto",
    "envoy/config/route/v3/route.proto",
    "envoy/extensions/access_loggers/file/v3/file.proto",
    "envoy/extensions/access_loggers/stream/v3/stream.proto",
    "envoy/extensions/filters/http/jwt_authn/v3/config.proto",
    "envoy/extensions/filters/http/rbac/v3/rbac.proto",
    "envoy/extensions/filters/http/router/v3/router.proto",
    "envoy/extensions/filters/listener/original_dst/v3/original_dst.proto",
    "envoy/extensions/filters/listener/tls_inspector/v3/tls_inspector.proto",
    "envoy/extensions/filters/network/http_connection_manager/v3/http_connection_manager.proto",
    "envoy/extensions/filters/network/rbac/v3/rbac.proto",
    "envoy/extensions/filters/network/tcp_proxy/v3/tcp_proxy.proto",
    "envoy/extensions/load_balancing_policies/least_request/v3/least_request.proto",
    "envoy/extensions/load_balancing_policies/maglev/v3/maglev.proto",
    "envoy/extensions/load_balancing_policies/random/v3/random.proto",
    "envoy/extensions/load_balancing_policies/ring_hash/v3/ring_hash.proto",
    "envoy/extensions/load_balancing_policies/round_robin/v3/round_robin.proto",
    "envoy/extensions/rbac/principals/mtls_authenticated/v3/mtls_authenticated.proto",
    "envoy/extensions/retry/host/previous_hosts/v3/previous_hosts.proto",
    "envoy/extensions/transport_sockets/raw_buffer/v3/raw_buffer.proto",
    "envoy/extensions/transport_sockets/tls/v3/tls.proto",
    "envoy/extensions/upstreams/http/v3/http_protocol_options.proto",
    "envoy/service/discovery/v3/ads.proto",
    "envoy/service/discovery/v3/discovery.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(envoy), Some(out)) = (args.next(), args.next()) else {
        return Err("usage: vmesh-proto-codegen ENVOY_BINARY CRATE_DIR".into());
    };
    let binary = std::fs::read(&envoy).map_err(|e| format!("cannot read {}: {e}", envoy.display()))?;
    let files = descriptors(&binary);
    let set = closure(&files, ROOTS)?;
    println!("{} of {} files", set.file.len(), files.len());
    std::fs::write(out.join("src/descriptors.binpb"), set.encode_to_vec())?;
    generate(set, &out.join("src/generated"))
}

fn generate(set: FileDescriptorSet, out: &Path) -> Result<(), Box<dyn Error>> {
    if out.exists() {
        std::fs::remove_dir_all(out)?;
    }
    std::fs::create_dir_all(out)?;
    prost_build::Config::new()
        .bytes(["."])
        .btree_map(["."])
        .enable_type_names()
        // Without the domain `Name::type_url()` is `/envoy...`, which matches no xDS subscription.
        .type_name_domain(["."], "type.googleapis.com")
        // `Any` must be ours, so that its `value` is `Bytes`.
        .compile_well_known_types()
        .disable_comments(["."])
        .include_file("mod.rs")
        .out_dir(out)
        .compile_fds(set)?;
    Ok(())
}

/// Every file descriptor found in `binary`, by file name; the longest copy where one is found twice.
fn descriptors(binary: &[u8]) -> BTreeMap<String, FileDescriptorProto> {
    let mut found: BTreeMap<String, (usize, FileDescriptorProto)> = BTreeMap::new();
    for start in 0..binary.len() {
        if !looks_like_a_file_name(&binary[start..]) {
            continue;
        }
        let end = start + message_length(&binary[start..]);
        let Ok(file) = FileDescriptorProto::decode(&binary[start..end]) else { continue };
        let length = end - start;
        match found.get(file.name()) {
            Some((known, _)) if *known >= length => {}
            _ => _ = found.insert(file.name().to_owned(), (length, file)),
        }
    }
    found.into_iter().map(|(name, (_, file))| (name, file)).collect()
}

/// Field 1 (`name`) of a `FileDescriptorProto`: tag 0x0a, a length, a path ending in `.proto`, another field's tag.
fn looks_like_a_file_name(bytes: &[u8]) -> bool {
    let [0x0a, length @ 7..=127, rest @ ..] = bytes else { return false };
    let Some((name, rest)) = rest.split_at_checked(usize::from(*length)) else { return false };
    name.ends_with(b".proto")
        && name.iter().all(|b| b.is_ascii_alphanumeric() || b"_-/.".contains(b))
        && matches!(rest.first(), Some(0x12 | 0x1a | 0x22 | 0x2a | 0x32))
}

/// Returns the length of the `FileDescriptorProto` that begins at the start of `bytes`. No length is stored: fields come in ascending
/// order (except for the options), and the last field is `syntax`.
fn message_length(bytes: &[u8]) -> usize {
    let (mut end, mut last) = (0, 0);
    loop {
        let mut at = end;
        let Some(tag) = varint(bytes, &mut at) else { return end };
        let (field, wire) = (tag >> 3, tag & 7);
        let known = matches!(field, 1..=8 | 10..=12 | 14);
        if !known || (field < last && field != 3 && last != 10 && last != 11) || (field == 1 && end != 0) {
            return end;
        }
        let Some(value) = varint(bytes, &mut at) else { return end };
        match wire {
            0 => {}
            2 => match at.checked_add(usize::try_from(value).unwrap_or(usize::MAX)) {
                Some(next) if next <= bytes.len() => at = next,
                _ => return end,
            },
            _ => return end,
        }
        (end, last) = (at, field);
        if field == 12 {
            return end;
        }
    }
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let (mut value, mut shift) = (0u64, 0);
    loop {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
        shift += 7;
    }
}

/// `roots` and all that they import, each file after its imports.
fn closure(files: &BTreeMap<String, FileDescriptorProto>, roots: &[&str]) -> Result<FileDescriptorSet, String> {
    fn add(
        name: &str,
        files: &BTreeMap<String, FileDescriptorProto>,
        done: &mut BTreeSet<String>,
        set: &mut FileDescriptorSet,
    ) -> Result<(), String> {
        if !done.insert(name.to_owned()) {
            return Ok(());
        }
        let file = files.get(name).ok_or_else(|| format!("this Envoy has no {name}"))?;
        for import in &file.dependency {
            add(import, files, done, set)?;
        }
        set.file.push(file.clone());
        Ok(())
    }
    let (mut done, mut set) = (BTreeSet::new(), FileDescriptorSet::default());
    for root in roots {
        add(root, files, &mut done, &mut set)?;
    }
    Ok(set)
}
