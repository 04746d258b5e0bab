#!/usr/bin/env bash
# Unpacks Slurm and munge of this Debian or Ubuntu below the folder that is given, with the libraries that they need:
# no root, nothing outside the folder. Ends at once when it has been done; else it needs the system's package sources.
set -euo pipefail

folder=$1
[ ! -e "$folder/usr/sbin/munged" ] || exit 0
part=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$part"' EXIT
mkdir -p "$part/lists/partial" "$part/debs"
cd "$part/debs"

names() { # what the system lacks of it
    apt-get "$@" --simulate --no-install-recommends install slurm-wlm munge 2>/dev/null | awk '/^Inst / { print $2 }'
}

fetch() { # fetch APT-OPTIONS...
    local wanted
    wanted=$(names "$@") && [ -n "$wanted" ] || return 1
    # shellcheck disable=SC2086
    timeout 120 apt-get "$@" download $wanted >/dev/null 2>&1
}

own=(-o Debug::NoLocking=1 -o "Dir::State::Lists=$part/lists" -o "Dir::Cache=$part/cache" -o APT::Sandbox::User="$(id -un)")
if ! fetch; then # the system has no lists, or old ones
    mkdir -p "$part/cache/archives/partial"
    timeout 120 apt-get "${own[@]}" update >/dev/null 2>&1 || true
    fetch "${own[@]}" || {
        echo "slurm-wlm and munge can't be fetched from the system's package sources" >&2
        exit 1
    }
fi
mkdir "$part/root"
for package in *.deb; do
    dpkg --extract "$package" "$part/root"
done
for program in slurmctld slurmd slurmstepd; do # Debian's alternatives, which are links made at installation
    [ -e "$part/root/usr/sbin/$program" ] || ln -s "$program-wlm" "$part/root/usr/sbin/$program"
done
mv -T "$part/root" "$folder"
